"""Softmax  y_i = e^(x_i)/Σⱼ e^(x_j)  and its logarithm  z_i = x_i - log Σⱼ e^(x_j),  along one dimension.

Derivation.  log Σⱼ e^(x_j), the log-sum-exp, has the derivative e^(x_k)/Σⱼ e^(x_j) = y_k: the softmax is its gradient.
So

    ∂z_i/∂x_k = [i = k] - y_k,                                                    (1)

and since y = e^z, the chain rule gives

    ∂y_i/∂x_k = y_i·([i = k] - y_k).                                              (2)

No matrix is needed for the products with a vector g. Of (1), where Jᵀ ≠ J,

    (Jᵀg)_k = g_k - y_k·Σᵢ g_i                                                    (3)
    (J g)_i = g_i - Σₖ y_k·g_k                                                    (4)

and of (2), which is symmetric, so that backward and jvp are the same product,

    (J g)_i = y_i·(g_i - Σₖ y_k·g_k).                                             (5)

Both save their output alone: y, or z with y = e^z.

Reference: Bridle 1990, "Training stochastic model recognition algorithms as networks", NeurIPS 2.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import _get_softmax_dim  # type: ignore[attr-defined]

from torchcalc import native
from torchcalc.autograd import Function
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import autocasts_to_float32, like, widen
from torchcalc.tracing import NotScripted, leaf

__all__ = ["LogSoftmax", "Softmax", "log_softmax", "softmax"]


def softmax_backward(y: Tensor, g: Tensor, dim: int) -> Tensor:
    y, g = widen(y), widen(g)
    return y * (g - (y * g).sum(dim, keepdim=True))  # (5)


def log_softmax_backward(z: Tensor, g: Tensor, dim: int) -> Tensor:
    y, g = widen(z).exp(), widen(g)
    return g - y * g.sum(dim, keepdim=True)  # (3)


class SoftmaxFunction(Function):
    autocast = "off"  # softmax() chooses the dtype

    @staticmethod
    def forward(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return torch.softmax(x, dim, dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return softmax_backward(y, grad_output, ctx.dim).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _dim: None, _dtype: None) -> Tensor:
        (y,) = ctx.saved_tensors
        return like(softmax_backward(y, tangent.to(y.dtype), ctx.dim), y)


class LogSoftmaxFunction(Function):
    autocast = "off"

    @staticmethod
    def forward(x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
        return torch.log_softmax(x, dim, dtype=dtype)

    setup_context = staticmethod(SoftmaxFunction.setup_context)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return log_softmax_backward(z, grad_output, ctx.dim).to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _dim: None, _dtype: None) -> Tensor:
        (z,) = ctx.saved_tensors
        y, t = widen(z).exp(), widen(tangent.to(z.dtype))
        return like(t - (y * t).sum(ctx.dim, keepdim=True), z)  # (4)


@leaf
def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum of exp(input) along ``dim``, as ``torch.nn.functional.softmax``.

    Args:
        input: tensor of any shape and float dtype; other dtypes need ``dtype``.
        dim: the dimension, -input.dim() ≤ dim < input.dim(). None is torch's deprecated guess, with its warning.
        dtype: input is cast to it first; also the dtype of the result.

    Returns:
        Tensor of the same shape, in [0, 1].

    Raises:
        IndexError: if ``dim`` is out of range.

    Reference: Bridle 1990, "Training stochastic model recognition algorithms as networks", NeurIPS 2.

    >>> softmax(torch.tensor([0.0, 0.0, torch.inf]).neg(), dim=0)
    tensor([0.5000, 0.5000, 0.0000])
    """
    if dim is None:
        dim = _get_softmax_dim("softmax", input.dim(), _stacklevel + 1)
    return _along(input, dim, dtype, False)


@leaf
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """log(softmax(input)) along ``dim``, without overflow or underflow, as ``torch.nn.functional.log_softmax``.

    Args:
        input: tensor of any shape and float dtype; other dtypes need ``dtype``.
        dim: the dimension, -input.dim() ≤ dim < input.dim(). None is torch's deprecated guess, with its warning.
        dtype: input is cast to it first; also the dtype of the result.

    Returns:
        Tensor of the same shape, ≤ 0.

    Raises:
        IndexError: if ``dim`` is out of range.

    Reference: Bridle 1990, "Training stochastic model recognition algorithms as networks", NeurIPS 2.

    >>> log_softmax(torch.tensor([0.0, -1000.0]), dim=0)
    tensor([    0., -1000.])
    """
    if dim is None:
        dim = _get_softmax_dim("log_softmax", input.dim(), _stacklevel + 1)
    return _along(input, dim, dtype, True)


def _along(x: Tensor, dim: int, dtype: torch.dtype | None, log: bool) -> Tensor:
    """By torch's own kernels, forward and backward, where nothing looks on; the Functions above are what they compute."""
    if dtype is None and autocasts_to_float32(x):
        dtype = torch.float32
    if not torch.compiler.is_compiling():
        if (rows := kernels.rows()) is None:
            native.warn_once((x,), nodes=True)
        else:
            cast = x if dtype is None or dtype == x.dtype or not isinstance(x, Tensor) else x.to(dtype)
            y: Tensor | None = rows.softmax(cast, dim, log)
            if y is not None:
                return y
    return (LogSoftmaxFunction if log else SoftmaxFunction).apply(x, dim, dtype)


class Softmax(NotScripted, nn.Softmax):
    """Module of :func:`softmax`, as ``torch.nn.Softmax``.

    >>> Softmax(dim=-1)(torch.zeros(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`softmax`; any shape."""
        return softmax(input, self.dim, _stacklevel=6)  # above Module.__call__


class LogSoftmax(NotScripted, nn.LogSoftmax):
    """Module of :func:`log_softmax`, as ``torch.nn.LogSoftmax``.

    >>> LogSoftmax(dim=-1)(torch.zeros(4))
    tensor([-1.3863, -1.3863, -1.3863, -1.3863])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`log_softmax`; any shape."""
        return log_softmax(input, self.dim, _stacklevel=6)  # above Module.__call__
