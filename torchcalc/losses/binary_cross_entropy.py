"""Binary cross-entropy of logits:  ℓ = -p·t·log σ(x) - (1 - t)·log(1 - σ(x)),  p the weight of the positive class;
and of probabilities:  ℓ = -t·log q - (1 - t)·log(1 - q).

Derivation.  With s(x) = log(1 + eˣ) = max(x, 0) + log(1 + e^-|x|), which does not overflow, -log σ(x) = s(-x) and
-log(1 - σ(x)) = s(x), so

    ℓ = p·t·s(-x) + (1 - t)·s(x),   where 0·∞ = 0: a certain and right answer costs nothing.  (1)

s'(x) = σ(x), hence

    ∂ℓ/∂x = (1 - t)·σ(x) - p·t·σ(-x),   for p = 1:  σ(x) - t,                     (2)
    ∂ℓ/∂t = p·s(-x) - s(x),                                                       (3)
    ∂ℓ/∂p = t·s(-x).                                                              (4)

(2) is prediction minus target: where the sigmoid is flat, its vanishing slope has cancelled against that of the
logarithm, so a confident error still learns.

Of probabilities, torch and we take max(log, -100) for both logarithms, so that ℓ is finite. Away from 0 and 1

    ∂ℓ/∂q = -t/q + (1 - t)/(1 - q) = (q - t)/(q·(1 - q)),                         (5)
    ∂ℓ/∂t = log(1 - q) - log q,                                                   (6)

where torch and we take 10⁻¹² for a smaller denominator in (5): a certain and wrong answer gets a gradient of 10¹², and
not none, as the bound of the logarithm would have it. Prefer logits: (2) has no such bound.

The loss is L = reduce(w·ℓ), a mean being over the number of elements. Saves its arguments.

Reference: Cox 1958, "The regression analysis of binary sequences", doi:10.1111/j.2517-6161.1958.tb00292.x.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active

from torchcalc.activations.softplus import log_1p_exp_of_both
from torchcalc.formula import Term, loss, maximum, times, where
from torchcalc.losses.reduction import resolve
from torchcalc.promotion import autocasts
from torchcalc.tracing import NotScripted, leaf

__all__ = ["BCELoss", "BCEWithLogitsLoss", "binary_cross_entropy", "binary_cross_entropy_with_logits"]


def value(x: Term, t: Term) -> Term:
    s, s_of_minus_x = log_1p_exp_of_both(x)
    return times(t, s_of_minus_x) + times(1 - t, s)  # (1)


def slope_x(x: Term, t: Term) -> Term:
    return x.sigmoid() - t  # (2)


def slope_t(x: Term) -> Term:
    return -x  # (3): s(-x) - s(x)


def weighted_value(x: Term, t: Term, p: Term) -> Term:
    s, s_of_minus_x = log_1p_exp_of_both(x)
    return times(p * t, s_of_minus_x) + times(1 - t, s)  # (1)


def weighted_slope_x(x: Term, t: Term, p: Term) -> Term:
    return (1 - t) * x.sigmoid() - p * t * (-x).sigmoid()  # (2)


def weighted_slope_t(x: Term, p: Term) -> Term:
    s, s_of_minus_x = log_1p_exp_of_both(x)
    return times(p, s_of_minus_x) - s  # (3)


def slope_p(x: Term, t: Term) -> Term:
    return times(t, log_1p_exp_of_both(x)[1])  # (4)


def probability_value(q: Term, t: Term) -> Term:
    known = (t >= 0) & (t <= 1)  # where not, NaN; of q outside of [0, 1] a logarithm is
    return where(known, (t - 1) * maximum((-q).log1p(), -100) - t * maximum(q.log(), -100), math.nan)


def probability_slope_q(q: Term, t: Term) -> Term:
    return (q - t) / maximum(q * (1 - q), 1e-12)  # (5)


def probability_slope_t(q: Term) -> Term:
    return maximum((-q).log1p(), -100) - maximum(q.log(), -100)  # (6)


def torch_value(q: Tensor, t: Tensor, reduction: int) -> Tensor:
    kernel: Any = torch._C._nn.binary_cross_entropy  # below F.binary_cross_entropy; it takes the number
    result: Tensor = kernel(q, t, None, reduction)
    return result


_bce_of_probabilities = loss(
    "BCELoss", probability_value, probability_slope_q, probability_slope_t, torch_value=torch_value
)
_bce = loss("BCEWithLogitsLoss", value, slope_x, slope_t)
_weighted_bce = loss("BCEWithLogitsPosWeightLoss", weighted_value, weighted_slope_x, weighted_slope_t, slope_p)


@leaf
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """The binary cross-entropy of σ(input), as ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Args:
        input: logits, tensor of any shape and float dtype.
        target: probabilities of the positive class, in [0, 1], of the same shape; gets a gradient too if it needs one.
        weight: weights of the losses, ≥ 0, broadcast to the shape of input.
        size_average: deprecated, as in torch.
        reduce: deprecated, as in torch.
        reduction: ``"none"`` for the losses of the elements, ``"sum"``, or ``"mean"``, over the number of elements.
        pos_weight: weight of the positive class, ≥ 0, broadcast to the shape of input: > 1 for recall, < 1 for
            precision.

    Returns:
        0-d tensor, or for ``"none"`` one of the shape of input.

    Raises:
        ValueError: if ``reduction`` is unknown or input and target differ in size.
        RuntimeError: if ``weight`` or ``pos_weight`` does not broadcast.

    Differs from torch: ``weight`` and ``pos_weight`` may need a gradient; float16 and bfloat16 are computed in float32
    and rounded once.

    Reference: Cox 1958, doi:10.1111/j.2517-6161.1958.tb00292.x.

    >>> logit = torch.tensor([0.0], requires_grad=True)
    >>> loss = binary_cross_entropy_with_logits(logit, torch.ones(1))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}", logit.grad)
    0.6931 tensor([-0.5000])
    """
    reduction = resolve(reduction, size_average, reduce)
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    if not target.is_floating_point():
        raise RuntimeError(
            f"result type {_name(input)} can't be cast to the desired output type {_name(target)}; use target.float()"
        )
    if weight is not None and weight.shape != input.shape and not _expands(weight, input):
        input.detach().clone().mul_(weight)  # raises what torch raises
    if pos_weight is None:
        result = _bce(input, target, weight, reduction, False)
    else:
        if not _expands(pos_weight, input):
            pos_weight * input  # raises what torch raises, unless pos_weight is larger
        result = _weighted_bce(input, target, pos_weight.expand(input.shape), weight, reduction, False)
    return result if input.dtype == target.dtype or autocasts(input) else result.to(target.dtype)  # as torch


def _name(x: Tensor) -> str:
    """The dtype's name in torch's messages: Float, Long."""
    return x.type().split(".")[-1].removesuffix("Tensor")


def _expands(x: Tensor, to: Tensor) -> bool:
    """Whether x broadcasts to the shape of the other."""
    return x.dim() <= to.dim() and all(a in (1, b) for a, b in zip(reversed(x.shape), reversed(to.shape), strict=False))


class BCEWithLogitsLoss(NotScripted, nn.BCEWithLogitsLoss):
    """Module of :func:`binary_cross_entropy_with_logits`, as ``torch.nn.BCEWithLogitsLoss``.

    >>> BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))(torch.zeros(1), torch.ones(1))
    tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`binary_cross_entropy_with_logits`; input and target of one shape."""
        return binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


@leaf
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The binary cross-entropy of probabilities, as ``torch.nn.functional.binary_cross_entropy``.

    Args:
        input: probabilities of the positive class, in [0, 1], tensor of any shape and float dtype.
        target: what they should be, in [0, 1], of the same shape; gets a gradient too if it needs one.
        weight: weights of the losses, ≥ 0, broadcast to the shape of target.
        size_average: deprecated, as in torch.
        reduce: deprecated, as in torch.
        reduction: ``"none"`` for the losses of the elements, ``"sum"``, or ``"mean"``, over the number of elements.

    Returns:
        0-d tensor, or for ``"none"`` one of the shape of input; no loss exceeds 100.

    Raises:
        ValueError: if ``reduction`` is unknown or input and target differ in size.
        RuntimeError: if an element of input or target is outside of [0, 1], on CPU; if ``weight`` does not broadcast;
            under CUDA's autocast.

    Differs from torch: ``weight`` may need a gradient; the gradient of target is finite where input is 0 or 1; float16 and
    bfloat16 are computed in float32 and rounded once.

    Reference: Cox 1958, doi:10.1111/j.2517-6161.1958.tb00292.x.

    >>> probability = torch.tensor([0.5], requires_grad=True)
    >>> loss = binary_cross_entropy(probability, torch.ones(1))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}", probability.grad)
    0.6931 tensor([-2.])
    """
    reduction = resolve(reduction, size_average, reduce)
    if target.size() != input.size():
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}) is deprecated. "
            "Please ensure they have the same size."
        )
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        raise RuntimeError(
            "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast; take the logits and "
            "binary_cross_entropy_with_logits"
        )
    if weight is not None:
        weight = weight.expand(torch.broadcast_shapes(target.size(), weight.size()))
    result = _bce_of_probabilities(input, target, weight, reduction, False)
    if not torch.compiler.is_compiling() and _may_be_read(result) and result.isnan().any():
        for name, x in (("input", input), ("target", target)):
            if not ((x >= 0) & (x <= 1)).all():
                raise RuntimeError(f"all elements of {name} should be between 0 and 1")
    return result


def _may_be_read(x: Tensor) -> bool:
    """Whether its numbers are there, and cheap to look at."""
    return type(x) is Tensor and x.device.type == "cpu" and not _are_functorch_transforms_active()


class BCELoss(NotScripted, nn.BCELoss):
    """Module of :func:`binary_cross_entropy`, as ``torch.nn.BCELoss``.

    >>> BCELoss(reduction="sum")(torch.tensor([0.5, 1.0]), torch.ones(2))
    tensor(0.6931)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`binary_cross_entropy`; input and target of one shape."""
        return binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)
