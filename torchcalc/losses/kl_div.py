"""Kullback-Leibler divergence:  ℓ = t·(log t - x),  where x = log q is the prediction and t the target's probability.

Derivation.  With (t·log t)' = log t + 1,

    ∂ℓ/∂x = -t,   ∂ℓ/∂t = log t + 1 - x.                                          (1)

With the target given as u = log t, ℓ = eᵘ·(u - x) and by the product rule

    ∂ℓ/∂x = -eᵘ,  ∂ℓ/∂u = eᵘ·(u - x + 1).                                         (2)

0·log 0 is 0, the limit of t·log t as t → 0, and 0·∞ = 0: what never happens costs nothing, whatever was predicted. Saves
x and t.

Reference: Kullback, Leibler 1951, "On information and sufficiency", doi:10.1214/aoms/1177729694.
"""

import warnings

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, loss, times
from torchcalc.losses.reduction import resolve
from torchcalc.promotion import autocasts
from torchcalc.tracing import NotScripted, leaf

__all__ = ["KLDivLoss", "kl_div"]


def value(x: Term, t: Term) -> Term:
    return times(t, t.log()) - times(t, x)  # not t·(log t - x): ∞ - ∞


def slope_x(t: Term) -> Term:
    return -t  # (1)


def slope_t(x: Term, t: Term) -> Term:
    return t.log() + 1 - x  # (1)


def log_value(x: Term, u: Term) -> Term:
    p = u.exp()
    return times(p, u) - times(p, x)


def log_slope_x(u: Term) -> Term:
    return -u.exp()  # (2)


def log_slope_u(x: Term, u: Term) -> Term:
    p = u.exp()
    return times(p, u) - times(p, x) + p  # (2)


_kl_div = loss("KLDivLoss", value, slope_x, slope_t)
_kl_div_of_log = loss("KLDivLogTargetLoss", log_value, log_slope_x, log_slope_u)


@leaf
def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """The divergence of the distribution exp(input) from target, as ``torch.nn.functional.kl_div``.

    Args:
        input: logarithms of predicted probabilities, tensor of any shape and float dtype.
        target: probabilities, or their logarithms, of the same shape or one that broadcasts; gets a gradient too if it
            needs one.
        size_average: deprecated, as in torch.
        reduce: deprecated, as in torch.
        reduction: ``"none"`` for the terms of the elements, ``"sum"``, ``"batchmean"``, which divides the sum by input's
            first size and so is the mean of the divergences, or ``"mean"``, over the number of elements, which warns.
        log_target: whether target is given as logarithms.

    Returns:
        0-d tensor, or for ``"none"`` one of the common shape.

    Raises:
        ValueError: if ``reduction`` is unknown.
        RuntimeError: if the shapes do not broadcast.

    Differs from torch: 0·∞ = 0, where torch has NaN: a target of 0 costs nothing where the prediction is 0 as well; the
    gradient of a target of 0 is -∞; float16 and bfloat16 are computed in float32 and rounded once.

    Reference: Kullback, Leibler 1951, doi:10.1214/aoms/1177729694.

    >>> prediction = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    >>> loss = kl_div(prediction, torch.tensor([[1.0, 0.0]]), reduction="batchmean")
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}", prediction.grad)
    0.6931 tensor([[-1., -0.]])
    """
    # torch.compile would refuse the warning where it must not break the graph.
    if size_average is None and reduce is None and reduction == "mean" and not torch.compiler.is_compiling():
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            stacklevel=3,
        )
    reduction = resolve(reduction, size_average, reduce)
    batch = input.size(0) if input.dim() else 1
    if input.shape != target.shape:
        target, input = torch.broadcast_tensors(target, input)  # in torch's order, for the message
    function = _kl_div_of_log if log_target else _kl_div
    if reduction != "batchmean":
        return function(input, target, None, reduction, False)
    dtype = torch.promote_types(input.dtype, target.dtype)
    if autocasts(input) or dtype not in (torch.float16, torch.bfloat16):
        return function(input, target, None, "sum", False) / batch
    return (function(input.float(), target.float(), None, "sum", False) / batch).to(dtype)  # rounded once


class KLDivLoss(NotScripted, nn.KLDivLoss):
    """Module of :func:`kl_div`, as ``torch.nn.KLDivLoss``.

    >>> KLDivLoss(reduction="batchmean")(torch.zeros(1, 2), torch.tensor([[1.0, 0.5]]))
    tensor(-0.3466)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`kl_div`; input and target of one shape."""
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)
