"""Attention:  Y = P·V,  P = softmax of each row of S,  S = α·Q·Kᵀ + M,  α = 1/√E unless given.

A row of Q is a query, a row of K a key, and E their length; M is a mask, of numbers that are added or, where it is False, of -∞.

Derivation.  With G = ∂L/∂Y, and A = G·Vᵀ the gradient of P, the products give (linear.py)

    ∂L/∂V = Pᵀ·G,                                                                 (1)

and the softmax of each row i (softmax.py), with δ_i = Σ_j P_ij·A_ij,

    ∂L/∂S = P∘(A - δ) =: D,                                                       (2)
    ∂L/∂Q = α·D·K,   ∂L/∂K = α·Dᵀ·Q,   ∂L/∂M = D.                                 (3)

In forward mode, with Ṡ = α·(Q̇·Kᵀ + Q·K̇ᵀ) + Ṁ and m_i = Σ_j P_ij·Ṡ_ij,

    Ṗ = P∘(Ṡ - m),   Ẏ = Ṗ·V + P·V̇.                                              (4)

The gradients change by the product rule: with Ȧ = Ġ·Vᵀ + G·V̇ᵀ and δ̇_i = Σ_j (Ṗ·A + P·Ȧ)_ij,

    Ḋ = Ṗ∘(A - δ) + P∘(Ȧ - δ̇),                                                   (5)
    of (1) and (3):  Ṗᵀ·G + Pᵀ·Ġ,   α·(Ḋ·K + D·K̇),   α·(Ḋᵀ·Q + Dᵀ·Q̇),   Ḋ.       (6)

Second derivatives need nothing more. (1) and (3) are the gradient of ⟨G, Y⟩, whose Hessian in Q, K, V, M is symmetric: what
comes back to these from a direction U of their gradients is (6) along U, with Ġ = 0; and to G, in which ⟨G, Y⟩ is linear, (4).

S and P are never there as a whole: each row of them needs its own query alone, so a block of rows is enough at a time, and
what belongs to K and V is summed over the blocks. Memory is linear in the length of the sequence, in every derivative.

Saves Q, K, V, M. Where torch has fused kernels (on CPU and CUDA) value and first derivative are theirs, which save Y and the
rows' log Σ exp S as well. A row whose keys are all masked attends to nothing: P = 0.

Reference: Vaswani et al. 2017, arXiv:1706.03762; blocks: Dao et al. 2022, arXiv:2205.14135.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcalc import native
from torchcalc.autograd import Function
from torchcalc.casts import lowered
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import autocasts, unbroadcast, widen
from torchcalc.tracing import leaf

__all__ = ["scaled_dot_product_attention"]

#: Elements of S that are there at a time, unless one row of each head has more.
BLOCK = 1 << 22

Mask = Tensor | None


def blocks(q: Tensor, k: Tensor, mask: Mask, causal: bool, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows of Q, and their rows of P."""
    heads = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]).numel()
    rows = max(1, BLOCK // max(heads * k.shape[-2], 1))
    for start in range(0, q.shape[-2], rows):
        here = slice(start, min(start + rows, q.shape[-2]))
        s = (part_of(q, here) * scale) @ k.mT
        part = mask_of(mask, here)
        if part is not None:
            s = s.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else s + widen(part)
        if causal:
            query = torch.arange(start, here.stop, device=q.device)
            s = s.masked_fill(torch.arange(k.shape[-2], device=q.device) > query[:, None], -torch.inf)
        nothing = s.amax(-1, keepdim=True) == -torch.inf
        yield here, s.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def part_of(x: Tensor, here: slice) -> Tensor:
    """These rows of x; x itself where they are all."""
    n = here.stop - here.start
    return x if n == x.shape[-2] else x.narrow(-2, here.start, n)


def mask_of(mask: Mask, here: slice) -> Mask:
    """A mask's part for these rows; one of a single row is for all."""
    return mask if mask is None or mask.shape[-2] == 1 else part_of(mask, here)


class Sums:
    """The gradients of Q, K, V and M, as blocks of rows add to them: they come in the arguments' shapes and dtypes."""

    def __init__(self, *arguments: Tensor | None) -> None:
        self.arguments = arguments
        self.blocks: list[Tensor] = []  # of Q
        self.totals: list[Tensor | None] = [None] * 3  # of K, V, M
        self.masks: list[Tensor] = []  # of M, where its rows are those of Q

    def add(self, here: slice, *parts: Tensor | None) -> None:
        """Gradients of Q's rows, K, V, and M's rows; None of what is not needed."""
        q, *rest = parts
        if q is not None:
            self.blocks.append(q)
        mask = self.arguments[3]
        if rest[2] is not None and mask is not None:
            part = mask_of(mask, here)
            assert part is not None
            rest[2] = rest[2].sum_to_size(part.shape)
            if part is not mask:
                self.masks.append(rest[2])
                rest[2] = None
        for i, each in enumerate(rest):
            total = self.totals[i]
            if each is not None:
                self.totals[i] = each if total is None else total + each

    def result(self) -> list[Tensor | None]:
        """The sums, rounded once."""
        q = torch.cat(self.blocks, -2) if self.blocks else None
        k, v, mask = self.totals
        if self.masks:
            mask = torch.cat(self.masks, -2)
        return [
            None if grad is None or x is None else unbroadcast(grad, x)
            for grad, x in zip((q, k, v, mask), self.arguments, strict=True)
        ]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool, scale: float) -> Tensor:
    """Y, not yet rounded."""
    q, k, v = widen(q), widen(k), widen(v)
    return torch.cat([p @ v for _, p in blocks(q, k, mask, causal, scale)], -2)


def gradients(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    causal: bool,
    scale: float,
    needed: Sequence[bool] = (True, True, True, True),
) -> list[Tensor | None]:
    """∂L/∂Q, ∂L/∂K, ∂L/∂V, ∂L/∂M; None for what is not needed."""
    sums = Sums(q, k, v, mask)
    g, q, k, v = widen(g), widen(q), widen(k), widen(v)
    need_q, need_k, need_v, need_mask = needed
    for here, p in blocks(q, k, mask, causal, scale):
        g_ = part_of(g, here)
        a = g_ @ v.mT
        d = p * (a - (p * a).sum(-1, keepdim=True))  # (2)
        sums.add(
            here,
            scale * (d @ k) if need_q else None,  # (3)
            scale * (d.mT @ part_of(q, here)) if need_k else None,  # (3)
            p.mT @ g_ if need_v else None,  # (1)
            d if need_mask else None,  # (3)
        )
    return sums.result()


Tangents = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def tangents_of(q: Tensor | None, k: Tensor | None, v: Tensor | None, mask: Mask = None) -> Tangents:
    return q, k, v, mask


def score_change(here: slice, along: Tangents, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Ṡ of these rows; zero where nothing changes S."""
    dq, dk, _, dm = along
    change = torch.zeros((), dtype=q.dtype, device=q.device)
    if dq is not None:
        change = change + scale * (part_of(widen(dq), here) @ k.mT)
    if dk is not None:
        change = change + scale * (part_of(q, here) @ widen(dk).mT)
    part = mask_of(dm, here)
    return change if part is None else change + widen(part)


def tangent(along: Tangents, q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool, scale: float) -> Tensor:
    """Ẏ, not yet rounded."""
    q, k, v = widen(q), widen(k), widen(v)
    dv = along[2]
    rows = []
    for here, p in blocks(q, k, mask, causal, scale):
        ds = score_change(here, along, q, k, scale)
        dy = (p * (ds - (p * ds).sum(-1, keepdim=True))) @ v  # (4)
        rows.append(dy if dv is None else dy + p @ widen(dv))
    return torch.cat(rows, -2)


def gradients_change(
    dg: Tensor | None,
    along: Tangents,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    causal: bool,
    scale: float,
) -> list[Tensor | None]:
    """How the gradients of Q, K, V, M change as G and these do."""
    sums = Sums(q, k, v, mask)
    g, q, k, v = widen(g), widen(q), widen(k), widen(v)
    dq, dk, dv = (None if x is None else widen(x) for x in along[:3])
    for here, p in blocks(q, k, mask, causal, scale):
        g_, q_ = part_of(g, here), part_of(q, here)
        ds = score_change(here, along, q, k, scale)
        dp = p * (ds - (p * ds).sum(-1, keepdim=True))  # (4)
        a = g_ @ v.mT
        centred = a - (p * a).sum(-1, keepdim=True)
        d = p * centred  # (2)
        da = torch.zeros_like(a) if dv is None else g_ @ dv.mT
        dg_ = None if dg is None else part_of(widen(dg), here)
        if dg_ is not None:
            da = da + dg_ @ v.mT
        dd = dp * centred + p * (da - (dp * a + p * da).sum(-1, keepdim=True))  # (5)
        of_v = dp.mT @ g_
        sums.add(  # (6)
            here,
            scale * (dd @ k if dk is None else dd @ k + d @ dk),
            scale * (dd.mT @ q_ if dq is None else dd.mT @ q_ + d.mT @ part_of(dq, here)),
            of_v if dg_ is None else of_v + p.mT @ dg_,
            dd if mask is not None and mask.is_floating_point() else None,
        )
    return sums.result()


class AttentionGradient(Function):
    """(g, q, k, v, mask, causal, scale) to the gradients of q, k, v, and of a mask of numbers."""

    autocast = "off"

    @staticmethod
    def forward(
        g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool, scale: float
    ) -> tuple[Tensor | None, ...]:
        of_mask = mask is not None and mask.is_floating_point()
        grads = gradients(g, q, k, v, mask, causal, scale, (True, True, True, of_mask))
        return tuple(grads if of_mask else grads[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> tuple[Tensor | None, ...]:
        g, q, k, v, mask = ctx.saved_tensors
        direction = tangents_of(*along)
        dy = tangent(direction, q, k, v, mask, ctx.causal, ctx.scale)
        back = gradients_change(None, direction, g, q, k, v, mask, ctx.causal, ctx.scale)
        return dy.to(g.dtype), *back, None, None

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, *along: Any) -> tuple[Tensor | None, ...]:
        g, q, k, v, mask = ctx.saved_tensors
        grads = gradients_change(dg, tangents_of(*along[:4]), g, q, k, v, mask, ctx.causal, ctx.scale)
        return tuple(grads if mask is not None and mask.is_floating_point() else grads[:3])


class AttentionFunction(Function):
    autocast = "lower_precision"

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool, scale: float) -> Tensor:
        return attend(q, k, v, mask, causal, scale).to(q.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        return *backward(g, q, k, v, mask, ctx.causal, ctx.scale, ctx.needs_input_grad[:4]), None, None

    @staticmethod
    def jvp(ctx: Any, *along: Any) -> Tensor:
        q, k, v, mask = ctx.saved_tensors
        return tangent(tangents_of(*along[:4]), q, k, v, mask, ctx.causal, ctx.scale).to(q.dtype)


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool, scale: float, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients, to be differentiated again where grad mode is on; heads may be grouped."""
    if q.dim() >= 3 and k.dim() >= 3 and 1 < k.shape[-3] != q.shape[-3]:
        of_q, of_k, of_v, of_mask = backward(in_groups(g, k), *grouped(q, k, v, mask), causal, scale, needed)
        of_k, of_v = (None if x is None else x.squeeze(-3) for x in (of_k, of_v))
        return [None if of_q is None else of_q.reshape(q.shape), of_k, of_v, of_mask]
    if not torch.is_grad_enabled():
        return gradients(g, q, k, v, mask, causal, scale, needed)
    grads = (*AttentionGradient.apply(g, q, k, v, mask, causal, scale), None)
    return [grad if need else None for grad, need in zip(grads, needed, strict=False)]


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> bool:
    """Whether these are what attention is defined for; if not, torch says what is wrong."""
    tensors = [q, k, v] if mask is None else [q, k, v, mask]
    if any(x.is_nested or x.layout != torch.strided or x.device != q.device or x.numel() == 0 for x in tensors):
        return False
    if any(x.dim() < 2 or x.dtype != q.dtype or not x.is_floating_point() for x in (q, k, v)):
        return False
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or (mask is not None and mask.dim() < 2):
        return False
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        return False
    try:
        heads = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        scores = (*heads, q.shape[-2], k.shape[-2])
        return q.shape[:-2] == heads and (mask is None or torch.broadcast_shapes(mask.shape, scores) == scores)
    except RuntimeError:
        return False


def in_groups(x: Tensor, k: Tensor) -> Tensor:
    """The heads of x as (heads of keys, heads of each group)."""
    return x.reshape(*x.shape[:-3], k.shape[-3], -1, *x.shape[-2:])


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor, Mask]:
    """Of grouped queries: the arguments in groups."""
    if mask is not None and mask.dim() >= 3:
        mask = mask.unsqueeze(-3) if mask.shape[-3] == 1 else in_groups(mask, k)
    return in_groups(q, k), k.unsqueeze(-3), v.unsqueeze(-3), mask


def torchs(query: Tensor, key: Tensor, value: Tensor, *others: Any, **how: Any) -> Tensor:
    """torch's own, whose kernels read beyond the end where there are fewer values than keys."""
    if min(key.dim(), value.dim()) >= 2 and key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"key has {key.shape[-2]} rows and value {value.shape[-2]} (shapes {tuple(key.shape)}, {tuple(value.shape)}); "
            "each key needs its value"
        )
    return F.scaled_dot_product_attention(query, key, value, *others, **how)


@leaf
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale·query·keyᵀ + mask)·value, as ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: ``(*, heads, L, E)``, of float dtype; the heads may be absent.
        key: ``(*, heads, S, E)``, of the same dtype.
        value: ``(*, heads, S, Eᵥ)``, likewise.
        attn_mask: broadcasts to ``(*, heads, L, S)``: bool, True where a query sees a key, or of query's dtype, added.
        dropout_p: probability of dropping an element of the softmax, in [0, 1]; above 0 the call is torch's own, with
            torch's derivatives.
        is_causal: query i sees keys 0 to i alone; not beside a mask.
        scale: what query·keyᵀ is multiplied by; None is 1/√E.
        enable_gqa: whether query may have several times the heads of key and value, which then serve a group of heads each.

    Returns:
        ``(*, heads, L, Eᵥ)`` of query's dtype.

    Raises:
        RuntimeError: if shapes, dtypes or a mask beside ``is_causal`` do not fit, as torch.

    Differs from torch, whose fused kernels it uses: second derivatives and forward mode work with every kernel, in memory
    that is linear in L and S. On CPU a query with NaN gives NaN where there are fewer than 16 keys too, and keys without values
    are refused. What ``torch.compile`` traces is torch's own.

    Reference: Vaswani et al. 2017, arXiv:1706.03762; Dao et al. 2022, arXiv:2205.14135.

    >>> q = k = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> scaled_dot_product_attention(q, k, torch.tensor([[1.0], [2.0]]), is_causal=True)
    tensor([[1.0000],
            [1.6698]])
    """

    if torch.compiler.is_compiling() or dropout_p != 0.0 or (is_causal and attn_mask is not None):
        return torchs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if (rows := kernels.rows()) is None:
        native.warn_once((query,), nodes=True)
    elif autocasts(query):
        q, k, v, mask = lowered((query, key, value, attn_mask), query.device.type)
        with torch.autocast(query.device.type, enabled=False):
            return scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    else:
        found: Tensor | None = rows.attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if found is not None:
            return found
    given = query, key, value, attn_mask
    if groups := enable_gqa and min(query.dim(), key.dim()) >= 3 and query.shape[-3] != key.shape[-3]:
        if key.shape[-3] == 0 or query.shape[-3] % key.shape[-3] or key.shape[-3] != value.shape[-3]:
            return torchs(query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True)
        given = grouped(*given)
    if not fits(*given):
        return torchs(query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    y: Tensor = AttentionFunction.apply(*given, is_causal, query.shape[-1] ** -0.5 if scale is None else float(scale))
    return y.reshape(*query.shape[:-1], value.shape[-1]) if groups else y
