"""Negative log-likelihood of t under a normal distribution of mean x and variance v:  ℓ = ½·(log v + d²/v),  d = x - t.

Derivation.  By the chain rule

    ∂ℓ/∂x = d/v,   ∂ℓ/∂t = -d/v,                                                  (1)
    ∂ℓ/∂v = ½·(1/v - d²/v²) = (v - d²)/(2v²),                                     (2)

so that the best variance is the squared error itself. v is at least ε; like torch we take (2) at v = ε below it, and not
the 0 of a constant: otherwise a variance that has fallen below would stay there. The full loss adds the constant
½·log 2π. Saves x, t and v.

Reference: Nix, Weigend 1994, "Estimating the mean and variance of the target probability distribution",
doi:10.1109/ICNN.1994.374138.
"""

import math

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active

from torchcalc.formula import Term, loss, maximum
from torchcalc.tracing import NotScripted, leaf

__all__ = ["GaussianNLLLoss", "gaussian_nll_loss"]


def value(x: Term, t: Term, var: Term, *, eps: float, constant: float) -> Term:
    d, v = x - t, maximum(var, eps)
    return 0.5 * (v.log() + d * d / v) + constant


def slope_x(x: Term, t: Term, var: Term, *, eps: float) -> Term:
    return (x - t) / maximum(var, eps)  # (1)


def slope_t(x: Term, t: Term, var: Term, *, eps: float) -> Term:
    return (t - x) / maximum(var, eps)  # (1)


def slope_var(x: Term, t: Term, var: Term, *, eps: float) -> Term:
    d, v = x - t, maximum(var, eps)
    return 0.5 * (1 - d * d / v) / v  # (2)


_gaussian_nll = loss("GaussianNLLLoss", value, slope_x, slope_t, slope_var)


@leaf
def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """How surprising target is, given a predicted mean and variance, as ``torch.nn.functional.gaussian_nll_loss``.

    Args:
        input: means, tensor of any shape and float dtype.
        target: tensor of the same shape, or one that broadcasts; gets a gradient too if it needs one.
        var: variances, ≥ 0: one number; or a tensor of input's shape, of input's without the last dimension, or with one
            dimension of size 1.
        full: whether to add the constant ½·log 2π.
        eps: the least variance, > 0.
        reduction: ``"none"`` for the losses of the elements, ``"sum"``, or ``"mean"``.

    Returns:
        0-d tensor, or for ``"none"`` one of the common shape.

    Raises:
        ValueError: if ``reduction`` is unknown, ``var`` has a wrong size, or a variance is < 0.
        RuntimeError: if the shapes do not broadcast.

    Differs from torch: autocast computes it in float32; float16 and bfloat16 are computed in float32 and rounded once;
    under ``torch.func`` and ``torch.compile``, where torch raises or breaks the graph, negative variances go unnoticed.

    Reference: Nix, Weigend 1994, doi:10.1109/ICNN.1994.374138.

    >>> mean, variance = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    >>> loss = gaussian_nll_loss(mean, torch.tensor([3.0]), variance)
    >>> loss.backward()
    >>> loss.item(), mean.grad.item(), variance.grad.item()
    (2.0, -2.0, -1.5)
    """
    if not isinstance(var, Tensor):
        var = torch.full((), var, dtype=input.dtype, device=input.device).expand(input.shape)
    if _may_be_read(var) and _has_negative(var):
        raise ValueError("var has negative entry/entries")
    if var.size() != input.size():
        if input.size()[:-1] == var.size():
            var = var.unsqueeze(-1)
        elif input.ndim != var.ndim or sum(b for a, b in zip(input.size(), var.size(), strict=True) if a != b) != 1:
            raise ValueError(
                f"var is of incorrect size: {tuple(var.shape)}, where input has {tuple(input.shape)}; one dimension may "
                "be 1, or the last one missing"
            )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid; use 'none', 'mean' or 'sum'")
    return _gaussian_nll(input, target, var, None, reduction, False, eps, 0.5 * math.log(2 * math.pi) if full else 0.0)


def _may_be_read(x: Tensor) -> bool:
    """Whether there are numbers to look at, and an answer may depend on them."""
    return not (torch.compiler.is_compiling() or _are_functorch_transforms_active() or x.is_meta)


def _has_negative(x: Tensor) -> bool:
    """Whether a number is < 0: the least one tells, in one pass, unless it is NaN."""
    if x.numel() == 0:
        return False
    least = x.detach().min().item()
    return least < 0 or (least != least and bool((x < 0).any()))


class GaussianNLLLoss(NotScripted, nn.GaussianNLLLoss):
    """Module of :func:`gaussian_nll_loss`, as ``torch.nn.GaussianNLLLoss``.

    >>> GaussianNLLLoss()(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([1.0]))
    tensor(2.)
    """

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        """Apply :func:`gaussian_nll_loss`; means, targets and variances of one shape."""
        return gaussian_nll_loss(input, target, var, full=self.full, eps=self.eps, reduction=self.reduction)
