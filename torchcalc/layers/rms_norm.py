"""RMS norm:  y_i = w_i·x_i·r,  r = 1/√(ε + (1/n)·Σⱼ x_j²),  over the last dimensions, of n numbers together.

Derivation.  r is one number for a row, and depends on all of it:

    r = (ε + Σⱼ x_j²/n)^(-1/2),   ∂r/∂x_k = -½·r³·2x_k/n = -r³·x_k/n.             (1)

With g = ∂L/∂y, and h = w·g the gradient of what is multiplied by w, x̂ = x·r, r gets

    ∂L/∂r = Σᵢ h_i·x_i + ρ                                                        (2)

where ρ is what comes back to r by other ways. x_k is seen in x̂_k itself and through r:

    ∂L/∂x_k = r·h_k - r³·x_k/n·∂L/∂r = r·(h_k - x̂_k·m),   m = r·∂L/∂r/n.          (3)

Without ρ, m is the mean of h·x̂: what of h points along x̂ is taken out, since scaling a row changes nothing in y. And

    ∂L/∂w_i = Σ g_i·x̂_i   over all rows.                                          (4)

In forward mode ṙ = -r³·Σⱼ x_j·ẋ_j/n by (1), and

    ẏ = w·(ẋ·r + x·ṙ) + ẇ·x̂.                                                     (5)

Saves x, w, and r, one number for a row, in float32 or what is wider. r is an output of the Function: so its own derivative
is (1), by which second derivatives find their way without anything being computed anew.

float16 and bfloat16 are computed in float32 and rounded once, after the product with w; many models round x̂ first and lose
a bit. Squares of float16 do not overflow so. torch composes rms_norm on CPU of five operations; the kernel there,
native/csrc/norms.cpp, reads a row once forward, and x and g once backward.

Reference: Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled

from torchcalc import native
from torchcalc.autograd import Function
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import autocasts_to_float32, like, unbroadcast, widen
from torchcalc.tracing import NotScripted, leaf

__all__ = ["RMSNorm", "rms_norm"]


def of_rows(x: Tensor, dims: int) -> list[int]:
    """The last dims dimensions."""
    return list(range(x.dim() - dims, x.dim()))


def rstd(x: Tensor, dims: int, eps: float) -> Tensor:
    """r of each row of x, in whose dtype it is computed; its dimensions are x's, the last of size 1."""
    return torch.rsqrt(x.square().mean(of_rows(x, dims), keepdim=True) + eps)  # (1)


def gradients(
    g: Tensor,
    rho: Tensor | None,
    x: Tensor,
    w: Tensor | None,
    r: Tensor,
    dims: int,
    needed: Sequence[bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂x, not yet rounded, and ∂L/∂w; None for what is not needed."""
    g, x, r = widen(g), widen(x).conj(), r.conj()
    normed = x * r
    grad_x = None
    if needed[0]:
        h = g if w is None else g * w.conj()
        slope = (h * x).sum(of_rows(x, dims), keepdim=True)  # (2)
        slope = slope if rho is None else slope + rho
        grad_x = r * (h - normed * (slope * r / max(x.shape[x.dim() - dims :].numel(), 1)))  # (3)
    return grad_x, unbroadcast(g * normed, w) if w is not None and needed[1] else None  # (4)


def tangents(dx: Tensor, dw: Tensor | None, x: Tensor, w: Tensor | None, r: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """ẏ, not yet rounded, and ṙ."""
    dx, x = widen(dx), widen(x)
    dr = -(r**3) * (x * dx).mean(of_rows(x, dims), keepdim=True)  # (1)
    dy = dx * r + x * dr
    if w is not None:
        dy = w * dy
        dy = dy if dw is None else dy + dw * (x * r)  # (5)
    return dy, dr


class RMSNormFunction(Function):
    autocast = "off"  # rms_norm() chooses the dtype

    @staticmethod
    def forward(x: Tensor, w: Tensor | None, dims: int, eps: float) -> tuple[Tensor, Tensor]:
        v = widen(x)
        r = rstd(v, dims, eps)
        y = v * r
        return like(y if w is None else y * w, x), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, ctx.dims, _ = inputs
        ctx.save_for_backward(x, w, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, rho: Tensor) -> tuple[Tensor | None, ...]:
        x, w, r = ctx.saved_tensors
        grad_x, grad_w = gradients(g, rho, x, w, r, ctx.dims, ctx.needs_input_grad[:2])
        return None if grad_x is None else like(grad_x, x), grad_w, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor | None, _dims: None, _eps: None) -> tuple[Tensor, Tensor]:
        x, w, r = ctx.saved_tensors
        dy, dr = tangents(dx, dw, x, w, r, ctx.dims)
        return like(dy, x), dr


def epsilon(x: Tensor) -> float:
    """What torch takes for eps=None: of the dtype that is computed in."""
    return torch.finfo(torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype).eps


def fits(x: Tensor, shape: Sequence[int], *parameters: Tensor | None) -> bool:
    """Whether x ends in this shape, which the parameters have; if not, torch says what is wrong."""
    if x.is_nested or isinstance(shape, int):
        return False
    shape = tuple(shape)
    return (
        0 < len(shape) <= x.dim()
        and (x.is_floating_point() or x.is_complex())
        and x.shape[x.dim() - len(shape) :] == shape
        and all(p is None or p.shape == shape for p in parameters)
    )


def autocasted(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """In float32 where torch.autocast takes norms to it: on every device but the CPU; rms_norm from torch 2.13 on."""
    if not _is_any_autocast_enabled():
        return tensors
    return tuple(x.float() if isinstance(x, Tensor) and autocasts_to_float32(x) else x for x in tensors)


@leaf
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """input / √(eps + mean of input²) · weight over the last dimensions, as ``torch.nn.functional.rms_norm``.

    Args:
        input: ``(*, *normalized_shape)``, of float or complex dtype, any number of leading dimensions, none too.
        normalized_shape: the sizes of the last dimensions, over which the mean is taken; at least one.
        weight: of shape ``normalized_shape``; None for 1.
        eps: added to the mean of squares, ≥ 0; None is ``torch.finfo(dtype).eps``, of float32 for float16 and bfloat16.

    Returns:
        Tensor of the shape and dtype of input.

    Raises:
        RuntimeError: if the shapes do not fit, as torch.

    Reference: Zhang and Sennrich 2019, arXiv:1910.07467.

    >>> rms_norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), [4])
    tensor([1.2000, 1.6000, 0.0000, 0.0000])
    """
    x, w = autocasted(input, weight)
    if not torch.compiler.is_compiling():
        if (rows := kernels.rows()) is None:
            native.warn_once((x,), nodes=True)
        else:
            found: Tensor | None = rows.rms_norm(x, None, w, normalized_shape, eps)
            if found is not None:
                return found
    if x is None or not fits(x, normalized_shape, w):
        return F.rms_norm(input, normalized_shape, weight, eps)
    y, _ = RMSNormFunction.apply(x, w, len(normalized_shape), epsilon(x) if eps is None else eps)
    return y


class RMSNorm(NotScripted, nn.RMSNorm):
    """Module of :func:`rms_norm`: parameters, initialisation and ``state_dict`` of ``torch.nn.RMSNorm``.

    >>> RMSNorm(3)
    RMSNorm((3,), eps=None, elementwise_affine=True)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply :func:`rms_norm` to ``(*, *normalized_shape)``."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
