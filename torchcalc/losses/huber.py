"""Huber loss:  ℓ(d) = d²/2 where |d| ≤ δ,  δ·(|d| - δ/2) elsewhere,  d = input - target.

Derivation.  The parabola has the slope d, the line the slope δ·sign(d); at |d| = δ the two agree, in value and in
slope, so that the loss is once continuously differentiable:

    ℓ'(d) = d where |d| < δ,  δ·sign(d) where |d| ≥ δ.                            (1)

It is the squared error with its gradient clipped to [-δ, δ]. The second derivative jumps from 1 to 0 at |d| = δ; like
torch we take 0 there.

Reference: Huber 1964, "Robust estimation of a location parameter", doi:10.1214/aoms/1177703732.
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, where
from torchcalc.losses.reduction import resolve
from torchcalc.losses.residual import broadcast, check_weight, residual_loss
from torchcalc.tracing import NotScripted, leaf

__all__ = ["HuberLoss", "huber_loss"]


def value(d: Term, *, delta: float) -> Term:
    return where(d.abs() <= delta, 0.5 * d * d, delta * (d.abs() - 0.5 * delta))


def slope(d: Term, *, delta: float) -> Term:
    return where(d.abs() >= delta, delta * d.sgn(), d)  # (1); NaN is not ≥ δ and stays NaN


_huber = residual_loss("HuberLoss", value, slope, torch._C._nn.huber_loss)  # the kernel below F.huber_loss


@leaf
def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Squared error for small residuals, absolute error for large ones, as ``torch.nn.functional.huber_loss``.

    Args:
        input: tensor of any shape and float dtype.
        target: tensor of the same shape, or one that broadcasts, which warns; it gets a gradient too if it needs one.
        reduction: ``"none"`` for the losses of the elements, ``"sum"``, or ``"mean"``.
        delta: where the parabola becomes a line, > 0, in the unit of input.
        weight: weights of the losses, ≥ 0, of the size of input; the mean is over the number of elements, as in torch.

    Returns:
        0-d tensor, or for ``"none"`` one of the common shape.

    Raises:
        ValueError: if ``reduction`` is unknown or the size of ``weight`` is not that of ``input``.
        RuntimeError: if the shapes do not broadcast or ``delta`` ≤ 0.

    Differs from torch: under autocast the product with weight is computed in float32 too.

    Reference: Huber 1964, doi:10.1214/aoms/1177703732.

    >>> prediction = torch.tensor([0.5, 3.0], requires_grad=True)
    >>> loss = huber_loss(prediction, torch.zeros(2), reduction="none")
    >>> loss.sum().backward()
    >>> loss.tolist(), prediction.grad.tolist()
    ([0.125, 2.5], [0.5, 1.0])
    """
    input_, target = broadcast(input, target)
    reduction = resolve(reduction)
    if weight is not None:
        check_weight(weight, input)
    if delta <= 0:
        raise RuntimeError(
            f"huber_loss does not support non-positive values for delta, but it is {delta}; use mse_loss"
        )
    return _huber(input_, target, weight, reduction, False, delta)


class HuberLoss(NotScripted, nn.HuberLoss):
    """Module of :func:`huber_loss`, as ``torch.nn.HuberLoss``.

    >>> HuberLoss(delta=2.0)(torch.tensor([1.0]), torch.zeros(1))
    tensor(0.5000)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`huber_loss`; input and target of one shape."""
        return huber_loss(input, target, reduction=self.reduction, delta=self.delta)
