"""Mean absolute error:  ℓ(d) = |d|,  d = input - target.

Derivation.  |d| = d where d > 0 and -d where d < 0. At the kink d = 0 every number in [-1, 1] is a subgradient; torch
and we take 0:

    ℓ'(d) = sign(d).                                                              (1)

The step does not shrink with the error, and one outlier counts no more than any other point: the median of t minimises
the loss, as it does the negative log-likelihood of a Laplace distribution. For complex d, sign(d) = d/|d|.

Reference: Boscovich 1757; Laplace 1774, "Mémoire sur la probabilité des causes par les évènemens".
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term
from torchcalc.losses.reduction import resolve
from torchcalc.losses.residual import broadcast, check_weight, residual_loss
from torchcalc.tracing import NotScripted, leaf

__all__ = ["L1Loss", "l1_loss"]


def value(d: Term) -> Term:
    return d.abs()


def slope(d: Term) -> Term:
    return d.sgn()  # (1)


_l1 = residual_loss("L1Loss", value, slope, torch._C._nn.l1_loss)  # the kernel below F.l1_loss


@leaf
def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """The absolute error |input - target|, as ``torch.nn.functional.l1_loss``.

    Args:
        input: tensor of any shape, of float or complex dtype.
        target: tensor of the same shape, or one that broadcasts, which warns; it gets a gradient too if it needs one.
        size_average: deprecated, as in torch.
        reduce: deprecated, as in torch.
        reduction: ``"none"`` for the errors of the elements, ``"sum"``, or ``"mean"``.
        weight: weights of the errors, ≥ 0, of the size of input; the mean is then over the sum of the weights.

    Returns:
        0-d tensor, or for ``"none"`` one of the common shape; real.

    Raises:
        ValueError: if ``reduction`` is unknown or the size of ``weight`` is not that of ``input``.
        RuntimeError: if the shapes do not broadcast.

    Differs from torch: under autocast a weighted loss is computed in float32 too; torch's CPU then takes the low
    precision.

    Reference: Laplace 1774, "Mémoire sur la probabilité des causes par les évènemens".

    >>> prediction = torch.tensor([2.5, 3.0, 4.5], requires_grad=True)
    >>> loss = l1_loss(prediction, torch.tensor([3.0, 3.0, 5.0]), reduction="sum")
    >>> loss.backward()
    >>> loss.item(), prediction.grad.tolist()
    (1.0, [-1.0, 0.0, -1.0])
    """
    input_, target = broadcast(input, target)
    reduction = resolve(reduction, size_average, reduce)
    if weight is not None:
        check_weight(weight, input)
    return _l1(input_, target, weight, reduction, True)  # a weighted mean is over the sum of the weights


class L1Loss(NotScripted, nn.L1Loss):
    """Module of :func:`l1_loss`, as ``torch.nn.L1Loss``.

    >>> L1Loss()(torch.tensor([1.0, -2.0]), torch.zeros(2))
    tensor(1.5000)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`l1_loss`; input and target of one shape."""
        return l1_loss(input, target, reduction=self.reduction)
