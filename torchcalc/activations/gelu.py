"""GELU:  y = x·Φ(x),  Φ the distribution function of the standard normal.    Hendrycks, Gimpel 2016, arXiv:1606.08415

Derivation.  Φ(x) = ½·erfc(-x/√2), and its derivative is the density φ(x) = e^(-x²/2)/√(2π), so by the product rule

    y' = Φ(x) + x·φ(x).                                                           (1)

The approximation puts ½·(1 + tanh u) for Φ, with u = √(2/π)·(x + 0.044715·x³). With tanh' = 1 - tanh² and
u' = √(2/π)·(1 + 3·0.044715·x²),

    y' = ½·(1 + tanh u) + ½·x·(1 - tanh² u)·u'.                                   (2)

The maps are elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product. Saves x.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc.autograd import Function
from torchcalc.promotion import like, widen

__all__ = ["GELU", "gelu"]


def gelu_grad(x: Tensor) -> Tensor:
    cdf = 0.5 * torch.erfc(x * -math.sqrt(0.5))  # erfc keeps the digits of the left tail, which 1 + erf cancels
    pdf = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return cdf + x * pdf  # (1)


def gelu_tanh_grad(x: Tensor) -> Tensor:
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (k * (1 + 3 * 0.044715 * x * x))  # (2)


class GELUFunction(Function):
    autocast = "off"

    @staticmethod
    def forward(x: Tensor, approximate: str) -> Tensor:
        return F.gelu(x, approximate=approximate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, approximate = inputs
        ctx.save_for_backward(x)
        ctx.derivative = gelu_grad if approximate == "none" else gelu_tanh_grad

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return like(grad_output * ctx.derivative(widen(x)), x), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return like(tangent * ctx.derivative(widen(x)), x)


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

    >>> x = torch.tensor(0.0, requires_grad=True)
    >>> y = gelu(x)
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (0.0, 0.5)
    """
    return GELUFunction.apply(input, approximate)


class GELU(nn.GELU):
    """Module of :func:`gelu`, as ``torch.nn.GELU``.

    >>> GELU(approximate="tanh")
    GELU(approximate='tanh')
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`gelu`; any shape."""
        return gelu(input, approximate=self.approximate)
