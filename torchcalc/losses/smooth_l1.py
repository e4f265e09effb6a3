"""Smooth L1 loss:  ℓ(d) = d²/2β where |d| < β,  |d| - β/2 elsewhere,  d = input - target.

Derivation.  The parabola has the slope d/β, the line the slope sign(d); at |d| = β the two agree, in value and in slope:

    ℓ'(d) = d/β where |d| < β,  sign(d) where |d| ≥ β.                            (1)

It is the Huber loss divided by β, so that the line's slope is 1 for every β; as β → 0 it becomes |d|. The second
derivative jumps from 1/β to 0 at |d| = β; like torch we take 0 there.

Reference: Girshick 2015, "Fast R-CNN", arXiv:1504.08083.
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, where
from torchcalc.losses.l1 import _l1
from torchcalc.losses.reduction import resolve
from torchcalc.losses.residual import broadcast, residual_loss
from torchcalc.tracing import NotScripted, leaf

__all__ = ["SmoothL1Loss", "smooth_l1_loss"]


def value(d: Term, *, beta: float) -> Term:
    return where(d.abs() < beta, 0.5 * d * d / beta, d.abs() - 0.5 * beta)


def slope(d: Term, *, beta: float) -> Term:
    return where(d.abs() >= beta, d.sgn(), d / beta)  # (1); NaN is not ≥ β and stays NaN


_smooth_l1 = residual_loss(
    "SmoothL1Loss", value, slope, torch._C._nn.smooth_l1_loss
)  # the kernel below F.smooth_l1_loss


@leaf
def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Squared error for small residuals, absolute error for large ones, as ``torch.nn.functional.smooth_l1_loss``.

    Args:
        input: tensor of any shape and float dtype.
        target: tensor of the same shape, or one that broadcasts, which warns; it gets a gradient too if it needs one.
        size_average: deprecated, as in torch.
        reduce: deprecated, as in torch.
        reduction: ``"none"`` for the losses of the elements, ``"sum"``, or ``"mean"``.
        beta: where the parabola becomes a line, ≥ 0, in the unit of input; 0 is the absolute error.

    Returns:
        0-d tensor, or for ``"none"`` one of the common shape.

    Raises:
        ValueError: if ``reduction`` is unknown.
        RuntimeError: if the shapes do not broadcast or ``beta`` < 0.

    Reference: Girshick 2015, arXiv:1504.08083.

    >>> prediction = torch.tensor([0.5, 3.0], requires_grad=True)
    >>> loss = smooth_l1_loss(prediction, torch.zeros(2), reduction="none", beta=2.0)
    >>> loss.sum().backward()
    >>> loss.tolist(), prediction.grad.tolist()
    ([0.0625, 2.0], [0.25, 1.0])
    """
    input, target = broadcast(input, target)
    reduction = resolve(reduction, size_average, reduce)
    if beta < 0:
        raise RuntimeError(
            f"smooth_l1_loss does not support negative values for beta, but it is {beta}; take 0 for the absolute error"
        )
    if beta == 0:
        return _l1(input, target, None, reduction, False)
    return _smooth_l1(input, target, None, reduction, False, beta)


class SmoothL1Loss(NotScripted, nn.SmoothL1Loss):
    """Module of :func:`smooth_l1_loss`, as ``torch.nn.SmoothL1Loss``.

    >>> SmoothL1Loss(beta=2.0)(torch.tensor([1.0]), torch.zeros(1))
    tensor(0.2500)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`smooth_l1_loss`; input and target of one shape."""
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)
