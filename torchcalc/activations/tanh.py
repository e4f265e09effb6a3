"""Hyperbolic tangent:  y = tanh(x) = sinh(x)/cosh(x).

Derivation.  sinh' = cosh and cosh' = sinh, so by the quotient rule y' = (cosh² - sinh²)/cosh², that is

    y' = 1 - y².                                                                  (1)

The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product, but for complex x, where backward is
the product with Jᴴ, as torch defines it. The derivative is a function of the output alone, so y is saved and x need not
stay alive.

Reference: LeCun, Bottou, Orr, Müller 1998, "Efficient BackProp", doi:10.1007/3-540-49430-8_2.
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, pointwise
from torchcalc.tracing import NotScripted

__all__ = ["Tanh", "tanh"]


def value(x: Term) -> Term:
    return x.tanh()


def slope(y: Term) -> Term:
    return 1 - y * y  # (1)


_tanh = pointwise("Tanh", value, slope, torch_value=torch.tanh, whole=True)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent, elementwise, as ``torch.tanh``.

    Args:
        input: tensor of any shape, of float or complex dtype; integers are promoted to the default float dtype.

    Returns:
        Tensor of the same shape and dtype, in [-1, 1] if real.

    Reference: LeCun, Bottou, Orr, Müller 1998, doi:10.1007/3-540-49430-8_2.

    >>> x = torch.tensor(0.0, requires_grad=True)
    >>> y = tanh(x)
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (0.0, 1.0)
    """
    return _tanh(input)


class Tanh(NotScripted, nn.Tanh):
    """Module of :func:`tanh`, as ``torch.nn.Tanh``.

    >>> Tanh()(torch.zeros(2))
    tensor([0., 0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`tanh`; any shape."""
        return tanh(input)
