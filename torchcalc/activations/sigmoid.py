"""Sigmoid:  y = σ(x) = 1/(1 + e⁻ˣ).

Derivation.  With u = 1 + e⁻ˣ, y = u⁻¹ and u' = -e⁻ˣ, the chain rule gives y' = -u⁻²·u' = e⁻ˣ/(1 + e⁻ˣ)², and since
e⁻ˣ/(1 + e⁻ˣ) = 1 - y,

    y' = y·(1 - y).                                                               (1)

The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product, but for complex x, where backward is
the product with Jᴴ, as torch defines it. The derivative is a function of the output alone, so y is saved and x need not
stay alive.

Reference: Rumelhart, Hinton, Williams 1986, doi:10.1038/323533a0.
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, pointwise
from torchcalc.tracing import NotScripted

__all__ = ["Sigmoid", "sigmoid"]


def value(x: Term) -> Term:
    return x.sigmoid()


def slope(y: Term) -> Term:
    return y * (1 - y)  # (1)


_sigmoid = pointwise("Sigmoid", value, slope, torch_value=torch.sigmoid, whole=True)


def sigmoid(input: Tensor) -> Tensor:
    """The logistic sigmoid 1/(1 + exp(-input)), elementwise, as ``torch.sigmoid``.

    Args:
        input: tensor of any shape, of float or complex dtype; integers are promoted to the default float dtype.

    Returns:
        Tensor of the same shape and dtype, in [0, 1] if real.

    Reference: Rumelhart, Hinton, Williams 1986, doi:10.1038/323533a0.

    >>> x = torch.tensor(0.0, requires_grad=True)
    >>> y = sigmoid(x)
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (0.5, 0.25)
    """
    return _sigmoid(input)


class Sigmoid(NotScripted, nn.Sigmoid):
    """Module of :func:`sigmoid`, as ``torch.nn.Sigmoid``.

    >>> Sigmoid()(torch.zeros(2))
    tensor([0.5000, 0.5000])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`sigmoid`; any shape."""
        return sigmoid(input)
