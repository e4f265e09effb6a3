"""Absolute value:  y = |x|.

Derivation.  |x| = x where x > 0 and -x where x < 0. At the kink x = 0 every number in [-1, 1] is a subgradient; torch
and we take 0:

    y' = sign(x).                                                                 (1)

Of complex x = u + iv, y = √(u² + v²) has the partial derivatives u/y and v/y, so that its gradient is sign(x) = x/|x|.
The map is elementwise: backward is the product with (1), and the change of y by dx is Re(sign(x)*·dx). Saves x.
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, pointwise
from torchcalc.tracing import NotScripted

__all__ = ["Abs", "abs"]


def value(x: Term) -> Term:
    return x.abs()


def slope(x: Term) -> Term:
    return x.sgn()  # (1)


_abs = pointwise("Abs", value, slope, torch_value=torch.abs, holomorphic=False)


def abs(input: Tensor) -> Tensor:
    """The absolute value, elementwise, as ``torch.abs``.

    Args:
        input: tensor of any shape, of float or complex dtype; integers stay integers and have no gradient.

    Returns:
        Tensor of the same shape, ≥ 0 or NaN; of the same dtype, of complex numbers its real one.

    >>> x = torch.tensor([-3.0, 0.0], requires_grad=True)
    >>> y = abs(x)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([3.0, 0.0], [-1.0, 0.0])
    """
    return _abs(input)


class Abs(NotScripted, nn.Module):
    """Module of :func:`abs`; torch.nn has none.

    >>> Abs()(torch.tensor([-3.0, 1.0]))
    tensor([3., 1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`abs`; any shape."""
        return abs(input)
