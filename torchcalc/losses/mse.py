"""Mean squared error:  ℓ(d) = d²,  d = input - target.

Derivation.  As in square.py,

    ℓ'(d) = 2d,                                                                   (1)

so that the step against the gradient is proportional to the error itself. The loss is that of a Gaussian with mean x:
up to constants d²/2σ² is its negative log-likelihood, and the mean of t minimises it.

Reference: Gauss 1809, "Theoria motus corporum coelestium", on least squares.
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term
from torchcalc.losses.reduction import resolve
from torchcalc.losses.residual import broadcast, check_weight, residual_loss
from torchcalc.tracing import NotScripted, leaf

__all__ = ["MSELoss", "mse_loss"]


def value(d: Term) -> Term:
    return d * d


def slope(d: Term) -> Term:
    return 2 * d  # (1)


_mse = residual_loss("MSELoss", value, slope, torch._C._nn.mse_loss)  # the kernel below F.mse_loss


@leaf
def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """The squared error (input - target)², as ``torch.nn.functional.mse_loss``.

    Args:
        input: tensor of any shape and float dtype.
        target: tensor of the same shape, or one that broadcasts, which warns; it gets a gradient too if it needs one.
        size_average: deprecated, as in torch.
        reduce: deprecated, as in torch.
        reduction: ``"none"`` for the errors of the elements, ``"sum"``, or ``"mean"``.
        weight: weights of the errors, ≥ 0, of the size of input; the mean is then over the sum of the weights.

    Returns:
        0-d tensor, or for ``"none"`` one of the common shape.

    Raises:
        ValueError: if ``reduction`` is unknown or the size of ``weight`` is not that of ``input``.
        RuntimeError: if the shapes do not broadcast.

    Differs from torch: under autocast a weighted loss is computed in float32 too; torch's CPU then takes the low
    precision.

    Reference: Gauss 1809, "Theoria motus corporum coelestium".

    >>> prediction = torch.tensor([2.5, 3.1, 4.8], requires_grad=True)
    >>> loss = mse_loss(prediction, torch.tensor([3.0, 3.0, 5.0]))
    >>> loss.backward()
    >>> print(f"{loss.item():.2f}", prediction.grad)
    0.10 tensor([-0.3333,  0.0667, -0.1333])
    """
    input_, target = broadcast(input, target)
    reduction = resolve(reduction, size_average, reduce)
    if weight is not None:
        check_weight(weight, input)
    return _mse(input_, target, weight, reduction, True)  # a weighted mean is over the sum of the weights


class MSELoss(NotScripted, nn.MSELoss):
    """Module of :func:`mse_loss`, as ``torch.nn.MSELoss``.

    >>> MSELoss(reduction="sum")(torch.tensor([1.0, 2.0]), torch.zeros(2))
    tensor(5.)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`mse_loss`; input and target of one shape."""
        return mse_loss(input, target, reduction=self.reduction)
