"""Group norm:  y = w_c·x̂ + b_c,  where the channels c are in groups, and x̂ is x less its mean, over its deviation, both of
one sample and one group.

Derivation.  For x̂ a sample's group is a row: what :mod:`torchcalc.layers.layer_norm` derives for x̂ holds, equations (1) to
(5), with h = w_c·g. Weight and bias belong to channels, and are used at every place of every sample:

    ∂L/∂w_c = Σ g·x̂,   ∂L/∂b_c = Σ g   over samples and places of channel c.      (1)

Saves x, w, b for its dtype, and mean and 1/deviation, two numbers for a sample and a group, in float32 or what is wider.

On CPU torch takes the variance as E[x²] - μ² where channels lie side by side (``channels_last``): of values about 1000, spread
by 1, its result is off by 0.7. Such an input is taken apart here first, and put together again.

Reference: Wu and He 2018, arXiv:1803.08494.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc import native
from torchcalc.autograd import Function
from torchcalc.layers import layer_norm
from torchcalc.layers.layer_norm import beside, normalized_gradient, normalized_tangent
from torchcalc.layers.rms_norm import autocasted
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import like, unbroadcast, widen
from torchcalc.tracing import NotScripted, leaf

__all__ = ["GroupNorm", "group_norm"]


def in_groups(x: Tensor, groups: int) -> Tensor:
    """(samples, groups, numbers of a group)."""
    return x.reshape(x.shape[0], groups, x.shape[1:].numel() // groups)


def per_channel(w: Tensor, x: Tensor) -> Tensor:
    """w in the shape that broadcasts against x."""
    return w.view(-1, *[1] * (x.dim() - 2))


def statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """μ and r of each sample and group."""
    m, r = layer_norm.statistics(in_groups(widen(x), groups), [2], eps)
    return m.squeeze(2), r.squeeze(2)


def gradients(
    g: Tensor,
    nu: Tensor | None,
    rho: Tensor | None,
    x: Tensor,
    m: Tensor,
    r: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    groups: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂L/∂x, ∂L/∂w, ∂L/∂b; None for what is not needed."""
    g, v = widen(g), in_groups(widen(x), groups)
    m, r = m.unsqueeze(2), r.unsqueeze(2)
    grad_x = grad_w = None
    if needed[0]:
        h = in_groups(g if w is None else g * per_channel(w, x), groups)
        nu, rho = (None if a is None else a.unsqueeze(2) for a in (nu, rho))
        grad_x = like(normalized_gradient(h, nu, rho, v, m, r, [2]), x).view(x.shape)
    if w is not None and needed[1]:
        grad_w = unbroadcast(g * ((v - m) * r).view(x.shape), per_channel(w, x)).view(w.shape)  # (1)
    return grad_x, grad_w, unbroadcast(g, per_channel(b, x)).view(b.shape) if b is not None and needed[2] else None


class GroupNormFunction(Function):
    autocast = "off"  # group_norm() chooses the dtype

    @staticmethod
    def forward(
        x: Tensor, w: Tensor | None, b: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # As torch's kernels want it; on CPU they keep mean and 1/deviation in the dtype of the parameters.
        v, w, b = (widen(x), widen(w), widen(b)) if x.is_cpu else (x, w, b)
        w, b = (None if p is None else p.contiguous() for p in (w, b))
        samples, channels, *places = x.shape
        y, m, r = torch.native_group_norm(
            v.contiguous(), w, b, samples, channels, torch.Size(places).numel(), groups, eps
        )
        return like(y, x), m, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, w, b, ctx.groups, _ = inputs
        ctx.save_for_backward(x, w, b, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, nu: Tensor, rho: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, m, r = ctx.saved_tensors
        return *gradients(g, nu, rho, x, m, r, w, b, ctx.groups, ctx.needs_input_grad[:3]), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor | None, db: Tensor | None, *_: None) -> tuple[Tensor, Tensor, Tensor]:
        x, w, _b, m, r = ctx.saved_tensors
        v, dv = in_groups(widen(x), ctx.groups), in_groups(widen(dx), ctx.groups)
        dy, dm, dr = normalized_tangent(dv, v, m.unsqueeze(2), r.unsqueeze(2), [2])
        dy = dy.view(x.shape)
        if w is not None:
            dy = per_channel(w, x) * dy
            if dw is not None:
                dy = dy + per_channel(dw, x) * ((v - m.unsqueeze(2)) * r.unsqueeze(2)).view(x.shape)
        dy = dy if db is None else dy + per_channel(db, x)
        return like(dy, x), dm.squeeze(2), dr.squeeze(2)


@leaf
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """(input - mean) / √(eps + variance) · weight + bias over groups of channels, as ``torch.nn.functional.group_norm``.

    Args:
        input: ``(N, C, *)``, of float dtype, any number of further dimensions, none too.
        num_groups: into how many groups the channels are divided; a divisor of C.
        weight: ``(C,)``, of the dtype of input, or on CPU float32 beside 16 bits; None for 1.
        bias: likewise; None for 0.
        eps: added to the variance, ≥ 0.

    Returns:
        Tensor of the shape and dtype of input.

    Raises:
        RuntimeError: if shapes or dtypes do not fit, as torch.
        ValueError: if a group is one number, as torch.

    Reference: Wu and He 2018, arXiv:1803.08494.

    >>> group_norm(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), 2)
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """
    x, w, b = autocasted(input, weight, bias)
    if not torch.compiler.is_compiling():
        if (rows := kernels.rows()) is None:
            native.warn_once((x,), nodes=True)
        else:
            found: Tensor | None = rows.group_norm(x, w, b, num_groups, eps)
            if found is not None:
                return found
    if x is None or not fits(x, num_groups, w, b) or not beside(x, w, b):
        return F.group_norm(input, num_groups, weight, bias, eps)
    y, _, _ = GroupNormFunction.apply(x, w, b, num_groups, eps)
    return y


def fits(x: Tensor, groups: int, *parameters: Tensor | None) -> bool:
    """If not, torch says what is wrong."""
    return (
        not x.is_nested
        and x.is_floating_point()
        and x.dim() >= 2
        and groups > 0
        and x.shape[1] % groups == 0
        and x.numel() != groups
        and all(p is None or p.shape == x.shape[1:2] for p in parameters)
    )


class GroupNorm(NotScripted, nn.GroupNorm):
    """Module of :func:`group_norm`: parameters, initialisation and ``state_dict`` of ``torch.nn.GroupNorm``.

    >>> GroupNorm(2, 4, affine=False)(torch.tensor([[1.0, 3.0, 5.0, 9.0]]))
    tensor([[-1.0000,  1.0000, -1.0000,  1.0000]])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`group_norm` to ``(N, num_channels, *)``."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
