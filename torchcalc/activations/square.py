"""Square:  y = x².

Derivation.  The derivative is the limit of the difference quotient,

    ((x + h)² - x²)/h = (2xh + h²)/h = 2x + h  →  y' = 2x   as h → 0.             (1)

The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product, but for complex x, where backward is
the product with Jᴴ, as torch defines it. Saves x.
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, pointwise
from torchcalc.promotion import autocasts_to_float32
from torchcalc.tracing import NotScripted

__all__ = ["Square", "square"]


def value(x: Term) -> Term:
    return x * x


def slope(x: Term) -> Term:
    return 2 * x  # (1)


_square = pointwise("Square", value, slope, torch_value=torch.square)


def square(input: Tensor) -> Tensor:
    """input², elementwise, as ``torch.square``.

    Args:
        input: tensor of any shape, of float or complex dtype; integers stay integers and have no gradient.

    Returns:
        Tensor of the same shape and dtype.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> y = square(x)
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (9.0, 6.0)
    """
    return _square(input.float() if autocasts_to_float32(input) else input)


class Square(NotScripted, nn.Module):
    """Module of :func:`square`; torch.nn has none.

    >>> Square()(torch.tensor([-1.0, 3.0]))
    tensor([1., 9.])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`square`; any shape."""
        return square(input)
