"""Negative log-likelihood of a count t under a Poisson distribution of rate λ:  -log(λᵗ·e^-λ/t!) = λ - t·log λ + log t!

Derivation.  The prediction is x = log λ, without the constant log t!:

    ℓ = eˣ - t·x,               ∂ℓ/∂x = eˣ - t,           ∂ℓ/∂t = -x,             (1)

or the rate itself, x = λ, with ε against log 0:

    ℓ = x - t·log(x + ε),       ∂ℓ/∂x = 1 - t/(x + ε),    ∂ℓ/∂t = -log(x + ε).    (2)

The full loss adds Stirling's approximation of log t!, for t > 1, since 0! = 1! = 1:

    S = t·log t - t + ½·log(2πt),                         S' = log t + 1/(2t).    (3)

A count of 0 at a rate of 0 costs nothing: 0·∞ = 0. Saves x and t.

Reference: Nelder, Wedderburn 1972, "Generalized linear models", doi:10.2307/2344614.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, loss, maximum, times, where
from torchcalc.losses.reduction import resolve
from torchcalc.tracing import NotScripted, leaf

__all__ = ["PoissonNLLLoss", "poisson_nll_loss"]


def log_value(x: Term, t: Term) -> Term:
    return x.exp() - times(t, x)  # (1)


def log_slope_x(x: Term, t: Term) -> Term:
    return x.exp() - t


def log_slope_t(x: Term) -> Term:
    return -x


def value(x: Term, t: Term, *, eps: float) -> Term:
    return x - times(t, (x + eps).log())  # (2)


def slope_x(x: Term, t: Term, *, eps: float) -> Term:
    return 1 - t / (x + eps)


def slope_t(x: Term, *, eps: float) -> Term:
    return -(x + eps).log()


def stirling(t: Term) -> Term:
    many = maximum(t, 1)  # log 0 in the branch that is not taken would spoil the second derivative
    return where(t > 1, many * many.log() - many + 0.5 * (2 * math.pi * many).log(), 0)  # (3)


def stirling_slope(t: Term) -> Term:
    many = maximum(t, 1)
    return where(t > 1, many.log() + 0.5 / many, 0)  # (3)


def full_log_value(x: Term, t: Term) -> Term:
    return log_value(x, t) + stirling(t)


def full_log_slope_t(x: Term, t: Term) -> Term:
    return log_slope_t(x) + stirling_slope(t)


def full_value(x: Term, t: Term, *, eps: float) -> Term:
    return value(x, t, eps=eps) + stirling(t)


def full_slope_t(x: Term, t: Term, *, eps: float) -> Term:
    return slope_t(x, eps=eps) + stirling_slope(t)


_of_log: dict[bool, Callable[..., Tensor]] = {
    False: loss("PoissonNLLLoss", log_value, log_slope_x, log_slope_t),
    True: loss("PoissonNLLFullLoss", full_log_value, log_slope_x, full_log_slope_t),
}
_of_rate: dict[bool, Callable[..., Tensor]] = {
    False: loss("PoissonNLLRateLoss", value, slope_x, slope_t),
    True: loss("PoissonNLLRateFullLoss", full_value, slope_x, full_slope_t),
}


@leaf
def poisson_nll_loss(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """How surprising counts are, given predicted rates, as ``torch.nn.functional.poisson_nll_loss``.

    Args:
        input: the rates' logarithms, or the rates, tensor of any shape and float dtype.
        target: counts, ≥ 0, of the same shape or one that broadcasts; gets a gradient too if it needs one.
        log_input: whether input is given as logarithms.
        full: whether to add Stirling's approximation of log(target!).
        size_average: deprecated, as in torch.
        eps: added to a rate in its logarithm, ≥ 0.
        reduce: deprecated, as in torch.
        reduction: ``"none"`` for the losses of the elements, ``"sum"``, or ``"mean"``.

    Returns:
        0-d tensor, or for ``"none"`` one of the common shape.

    Raises:
        ValueError: if ``reduction`` is unknown.
        RuntimeError: if the shapes do not broadcast.

    Differs from torch: a count of 0 at a rate of 0 costs 0, where torch has NaN if ``eps`` is 0 or input a logarithm;
    float16 and bfloat16 are computed in float32 and rounded once.

    Reference: Nelder, Wedderburn 1972, doi:10.2307/2344614.

    >>> log_rate = torch.tensor([0.0], requires_grad=True)
    >>> loss = poisson_nll_loss(log_rate, torch.tensor([3.0]))
    >>> loss.backward()
    >>> loss.item(), log_rate.grad.item()
    (1.0, -2.0)
    """
    reduction = resolve(reduction, size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not a valid value for reduction; use 'none', 'mean' or 'sum'")
    target = target if target.is_floating_point() else target.to(input.dtype)
    if input.shape != target.shape:
        target, input = torch.broadcast_tensors(target, input)  # in torch's order, for the message
    if log_input:
        return _of_log[bool(full)](input, target, None, reduction, False)
    return _of_rate[bool(full)](input, target, None, reduction, False, eps)


class PoissonNLLLoss(NotScripted, nn.PoissonNLLLoss):
    """Module of :func:`poisson_nll_loss`, as ``torch.nn.PoissonNLLLoss``.

    >>> PoissonNLLLoss(log_input=False, eps=0.0)(torch.tensor([1.0]), torch.tensor([3.0]))
    tensor(1.)
    """

    def forward(self, log_input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`poisson_nll_loss`; predictions and counts of one shape."""
        return poisson_nll_loss(
            log_input, target, log_input=self.log_input, full=self.full, eps=self.eps, reduction=self.reduction
        )
