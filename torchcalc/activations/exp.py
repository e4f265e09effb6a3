"""Exponential function:  y = eˣ.

Derivation.  The difference quotient is eˣ·(eʰ - 1)/h, and (eʰ - 1)/h → 1 as h → 0, which is what defines e:

    y' = eˣ = y.                                                                  (1)

The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product, but for complex x, where backward is
the product with Jᴴ, as torch defines it. Saves y; x need not stay alive.
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, pointwise
from torchcalc.promotion import autocasts_to_float32
from torchcalc.tracing import NotScripted

__all__ = ["Exp", "exp"]


def value(x: Term) -> Term:
    return x.exp()


def slope(y: Term) -> Term:
    return y  # (1)


_exp = pointwise("Exp", value, slope, torch_value=torch.exp)


def exp(input: Tensor) -> Tensor:
    """e to the power of input, elementwise, as ``torch.exp``.

    Args:
        input: tensor of any shape, of float or complex dtype; integers are promoted to the default float dtype.

    Returns:
        Tensor of the same shape and dtype.

    >>> x = torch.tensor(0.0, requires_grad=True)
    >>> y = exp(x)
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (1.0, 1.0)
    """
    return _exp(input.float() if autocasts_to_float32(input) else input)


class Exp(NotScripted, nn.Module):
    """Module of :func:`exp`; torch.nn has none.

    >>> Exp()(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 2.7183])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`exp`; any shape."""
        return exp(input)
