"""GELU:  y = x·Φ(x),  Φ the distribution function of the standard normal.    Hendrycks, Gimpel 2016, arXiv:1606.08415

Derivation.  Φ(x) = ½·erfc(-x/√2), and its derivative is the density φ(x) = e^(-x²/2)/√(2π), so by the product rule

    y' = Φ(x) + x·φ(x).                                                           (1)

The approximation puts ½·(1 + tanh u) for Φ, with u = √(2/π)·(x + 0.044715·x³). With tanh' = 1 - tanh² and
u' = √(2/π)·(1 + 3·0.044715·x²),

    y' = ½·(1 + tanh u) + ½·x·(1 - tanh² u)·u'.                                   (2)

The maps are elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product. Saves x.
"""

import math
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc.formula import Term, pointwise
from torchcalc.tracing import NotScripted

__all__ = ["GELU", "gelu"]


def value(x: Term) -> Term:
    return x * (0.5 * (x * -math.sqrt(0.5)).erfc())  # erfc keeps the digits of the left tail, which 1 + erf cancels


def slope(x: Term) -> Term:
    z = x * -math.sqrt(0.5)
    return 0.5 * z.erfc() + x * ((-(z * z)).exp() * (1 / math.sqrt(2 * math.pi)))  # (1)


def tanh_value(x: Term) -> Term:
    return 0.5 * x * (1 + u(x).tanh())


def tanh_slope(x: Term) -> Term:
    t = u(x).tanh()
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x))  # (2)


def u(x: Term) -> Term:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)


_gelu = pointwise("GELU", value, slope, torch_value=F.gelu, whole=True)
_gelu_tanh = pointwise("GELUTanh", tanh_value, tanh_slope, torch_value=partial(F.gelu, approximate="tanh"), whole=True)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """The Gaussian error linear unit input·Φ(input), elementwise, as ``torch.nn.functional.gelu``.

    Args:
        input: tensor of any shape and float dtype.
        approximate: ``"none"`` for the exact function, ``"tanh"`` for the approximation.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        RuntimeError: if ``approximate`` is neither.

    Reference: Hendrycks, Gimpel 2016, arXiv:1606.08415.

    >>> import torch
    >>> x = torch.tensor(0.0, requires_grad=True)
    >>> y = gelu(x)
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (0.0, 0.5)
    """
    return (_gelu_tanh if is_tanh(approximate) else _gelu)(input)


def is_tanh(approximate: str) -> bool:
    """Which of the two is meant; refuses what is neither."""
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"approximate argument must be either none or tanh, but it is {approximate!r}")
    return approximate == "tanh"


class GELU(NotScripted, nn.GELU):
    """Module of :func:`gelu`, as ``torch.nn.GELU``.

    >>> GELU(approximate="tanh")
    GELU(approximate='tanh')
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`gelu`; any shape."""
        return gelu(input, approximate=self.approximate)
