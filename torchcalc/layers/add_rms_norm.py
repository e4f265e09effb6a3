"""RMS norm of a sum:  s = x + a,  y = w·s·r(s),  both of which a residual block goes on with.

Derivation.  y of s is :mod:`torchcalc.layers.rms_norm`'s, equations (1) to (5). s has a gradient σ of its own, from what
the block adds next, and its addends each have that of s:

    ∂L/∂x = ∂L/∂a = σ + ∂L/∂s, the latter by (3) there.                           (1)

Saves s, w, and r. In one pass s is written as it is read; done apart, it is read once more forward, and backward writes a
gradient that is read again to be added to σ. s is rounded to its dtype first: y is that of the s that is returned.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchcalc import native
from torchcalc.autograd import Function
from torchcalc.layers.rms_norm import epsilon, fits, gradients, rms_norm, rstd, tangents
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import autocasts_to_float32, like, widen
from torchcalc.tracing import leaf

__all__ = ["add_rms_norm"]


class AddRMSNormFunction(Function):
    autocast = "off"

    @staticmethod
    def forward(x: Tensor, a: Tensor, w: Tensor | None, dims: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        s = x + a
        v = widen(s)
        r = rstd(v, dims, eps)
        y = v * r
        return like(y if w is None else y * w, s), s, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, _, w, ctx.dims, _ = inputs
        ctx.save_for_backward(w, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, sigma: Tensor, rho: Tensor) -> tuple[Tensor | None, ...]:
        w, s, r = ctx.saved_tensors
        need_x, need_a, need_w, *_ = ctx.needs_input_grad
        grad, grad_w = gradients(g, rho, s, w, r, ctx.dims, (need_x or need_a, need_w))
        if grad is not None:
            grad = like(sigma + grad, s)  # (1)
        return grad, grad, grad_w, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, da: Tensor, dw: Tensor | None, *_: None) -> tuple[Tensor, Tensor, Tensor]:
        w, s, r = ctx.saved_tensors
        ds = dx + da
        dy, dr = tangents(ds, dw, s, w, r, ctx.dims)
        return like(dy, s), ds, dr


@leaf
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(input + residual), input + residual), on CPU in one pass over memory.

    Args:
        input: ``(*, *normalized_shape)``, of float or complex dtype.
        residual: likewise; of another shape or dtype where it can be added to input.
        normalized_shape: the sizes of the last dimensions, over which the mean is taken; at least one.
        weight: of shape ``normalized_shape``; None for 1.
        eps: added to the mean of squares, ≥ 0; None is ``torch.finfo(dtype).eps``, of float32 for float16 and bfloat16.

    Returns:
        Two tensors of the shape and dtype of the sum: normed, and the sum itself.

    Raises:
        RuntimeError: if the shapes do not fit.

    Reference: Zhang and Sennrich 2019, arXiv:1910.07467.

    >>> add_rms_norm(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0]), [2])
    (tensor([0.8485, 1.1314]), tensor([3., 4.]))
    """
    if autocasts_to_float32(input):
        s = input + residual
        return rms_norm(s, normalized_shape, weight, eps), s
    if not torch.compiler.is_compiling():
        if (rows := kernels.rows()) is None:
            native.warn_once((input, residual), nodes=True)
        else:
            found: tuple[Tensor, Tensor] | None = rows.rms_norm(input, residual, weight, normalized_shape, eps)
            if found is not None:
                return found
    alike = input.shape == residual.shape and input.dtype == residual.dtype
    if not alike or not fits(input, normalized_shape, weight):
        s = input + residual
        return rms_norm(s, normalized_shape, weight, eps), s
    eps = epsilon(input) if eps is None else eps
    y, s, _ = AddRMSNormFunction.apply(input, residual, weight, len(normalized_shape), eps)
    return y, s
