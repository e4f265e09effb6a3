"""Layer norm:  y_i = w_i·x̂_i + b_i,  x̂ = (x - μ)·r,  over the last dimensions, of n numbers together.

Derivation.  μ = Σⱼ x_j/n and r = 1/√(ε + Σⱼ (x_j - μ)²/n) are numbers of a row, and depend on all of it. Of the squares the
part through μ vanishes, for Σⱼ (x_j - μ) = 0:

    ∂μ/∂x_k = 1/n                                                                 (1)
    ∂r/∂x_k = -r³·(x_k - μ)/n.                                                    (2)

With g = ∂L/∂y and h = w·g = ∂L/∂x̂ they get

    ∂L/∂μ = -r·Σᵢ h_i + ν                                                         (3)
    ∂L/∂r = Σᵢ h_i·(x_i - μ) + ρ                                                  (4)

where ν and ρ are what comes back to μ and r by other ways. x_k is seen in x̂_k itself, through μ and through r:

    ∂L/∂x_k = r·(h_k - x̂_k·r·∂L/∂r/n) + ∂L/∂μ/n.                                  (5)

Without ν and ρ that is r·(h - mean(h) - x̂·mean(h·x̂)): what of h is constant, or points along x̂, is taken out, since
shifting and scaling a row changes nothing in y. Over all rows

    ∂L/∂w_i = Σ g_i·x̂_i,   ∂L/∂b_i = Σ g_i.                                       (6)

In forward mode μ̇ = mean(ẋ) and ṙ = -r³·mean((x - μ)·ẋ) by (1) and (2), and

    ẏ = w·((ẋ - μ̇)·r + (x - μ)·ṙ) + ẇ·x̂ + ḃ.                                    (7)

Saves x, w, b for its dtype, and μ and r, two numbers for a row, in float32 or what is wider; torch keeps them on CPU in 16
bits beside a weight of 16 bits, and its gradient is as exact as they. They are outputs of the Function: so their own
derivatives are (1) and (2), by which second derivatives find their way without anything being computed anew. On CPU
native/csrc/norms.cpp reads a row once forward, and x and g once backward; elsewhere the kernels are torch's.

The mean of squares is taken after μ is known, as torch does: E[x²] - μ² loses all digits of a row far from zero.

Reference: Ba, Kiros, Hinton 2016, arXiv:1607.06450.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc import native
from torchcalc.autograd import Function
from torchcalc.layers.rms_norm import autocasted, fits, of_rows
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import like, unbroadcast, widen
from torchcalc.tracing import NotScripted, leaf

__all__ = ["LayerNorm", "layer_norm"]


def statistics(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """μ and r of each row."""
    m = x.mean(dims, keepdim=True)
    m = m + (x - m).mean(dims, keepdim=True)  # nothing, but for what the first sum was rounded by
    return m, torch.rsqrt((x - m).square().mean(dims, keepdim=True) + eps)


def normalized_gradient(
    h: Tensor, nu: Tensor | None, rho: Tensor | None, x: Tensor, m: Tensor, r: Tensor, dims: list[int]
) -> Tensor:
    """∂L/∂x from h = ∂L/∂x̂."""
    n = max(x.numel() // max(m.numel(), 1), 1)
    centred = x - m
    of_m = -r * h.sum(dims, keepdim=True)  # (3)
    of_r = (h * centred).sum(dims, keepdim=True)  # (4)
    if nu is not None and rho is not None:
        of_m, of_r = of_m + nu, of_r + rho
    return r * (h - centred * r * (of_r * r / n)) + of_m / n  # (5)


def normalized_tangent(dx: Tensor, x: Tensor, m: Tensor, r: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of x̂, μ and r."""
    dm = dx.mean(dims, keepdim=True)  # (1)
    dr = -(r**3) * ((x - m) * dx).mean(dims, keepdim=True)  # (2)
    return (dx - dm) * r + (x - m) * dr, dm, dr


def gradients(
    g: Tensor,
    nu: Tensor | None,
    rho: Tensor | None,
    x: Tensor,
    m: Tensor,
    r: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    dims: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂L/∂x, ∂L/∂w, ∂L/∂b; None for what is not needed."""
    g, v = widen(g), widen(x)
    grad_x = None
    if needed[0]:
        h = g if w is None else g * w
        grad_x = like(normalized_gradient(h, nu, rho, v, m, r, of_rows(x, dims)), x)
    grad_w = unbroadcast(g * ((v - m) * r), w) if w is not None and needed[1] else None  # (6)
    return grad_x, grad_w, unbroadcast(g, b) if b is not None and needed[2] else None


class LayerNormFunction(Function):
    autocast = "off"  # layer_norm() chooses the dtype

    @staticmethod
    def forward(x: Tensor, w: Tensor | None, b: Tensor | None, dims: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        if not x.is_cpu:
            return torch.native_layer_norm(x, x.shape[x.dim() - dims :], w, b, eps)
        v = widen(x)
        m, r = statistics(v, of_rows(x, dims), eps)
        y = (v - m) * r
        y = y if w is None else y * w
        return like(y if b is None else y + b, x), m, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, w, b, ctx.dims, _ = inputs
        ctx.save_for_backward(x, w, b, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, nu: Tensor, rho: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, m, r = ctx.saved_tensors
        return *gradients(g, nu, rho, x, m, r, w, b, ctx.dims, ctx.needs_input_grad[:3]), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor | None, db: Tensor | None, *_: None) -> tuple[Tensor, Tensor, Tensor]:
        x, w, _b, m, r = ctx.saved_tensors
        v = widen(x)
        dy, dm, dr = normalized_tangent(widen(dx), v, m, r, of_rows(x, ctx.dims))
        if w is not None:
            dy = w * dy
            dy = dy if dw is None else dy + dw * ((v - m) * r)
        return like(dy if db is None else dy + db, x), dm, dr  # (7)


def beside(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether weight and bias have a dtype that is taken beside x: its own, or on CPU float32 beside 16 bits."""
    dtypes = {p.dtype for p in parameters if p is not None}
    return dtypes <= {x.dtype} or (x.is_cpu and dtypes == {widen(x).dtype})


@leaf
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / √(eps + variance) · weight + bias over the last dimensions, as ``torch.nn.functional.layer_norm``.

    Args:
        input: ``(*, *normalized_shape)``, of float dtype, any number of leading dimensions, none too.
        normalized_shape: the sizes of the last dimensions, over which mean and variance are taken; at least one.
        weight: of shape ``normalized_shape`` and the dtype of input, or on CPU float32 beside 16 bits; None for 1.
        bias: likewise; None for 0.
        eps: added to the variance, ≥ 0.

    Returns:
        Tensor of the shape and dtype of input.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, as torch.

    Reference: Ba, Kiros, Hinton 2016, arXiv:1607.06450.

    >>> layer_norm(torch.tensor([1.0, 2.0, 3.0, 2.0]), [4])
    tensor([-1.4142,  0.0000,  1.4142,  0.0000])
    """
    x, w, b = autocasted(input, weight, bias)
    if not torch.compiler.is_compiling():
        if (rows := kernels.rows()) is None:
            native.warn_once((x,), nodes=True)
        else:
            found: Tensor | None = rows.layer_norm(x, w, b, normalized_shape, eps)
            if found is not None:
                return found
    if x is None or not fits(x, normalized_shape, w, b) or x.is_complex() or not beside(x, w, b):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    y, _, _ = LayerNormFunction.apply(x, w, b, len(normalized_shape), eps)
    return y


class LayerNorm(NotScripted, nn.LayerNorm):
    """Module of :func:`layer_norm`: parameters, initialisation and ``state_dict`` of ``torch.nn.LayerNorm``.

    >>> LayerNorm(3)
    LayerNorm((3,), eps=1e-05, elementwise_affine=True, bias=True)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`layer_norm` to ``(*, *normalized_shape)``."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
