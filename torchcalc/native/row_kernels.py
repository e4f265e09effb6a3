"""Kernels of rows for GPUs: cross-entropy in one pass over the logits forward and one backward, as ``csrc/rows.cpp`` on CPU.
They compute equations (1) and (3) of :mod:`torchcalc.losses.cross_entropy`.

Forward is a program for each row, and one that sums what they found; backward a program for each block of a row. A row's
largest logit m, log Σ e^(x - m) and Σ q are what is kept. No call waits for the device: the mean's divisor stays on it.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor

from torchcalc.formula.triton import ELEMENTS, TYPES, compute_type, signature
from torchcalc.native import gpu

__all__ = ["Kept", "cross_entropy", "cross_entropy_gradient", "takes"]

#: The longest block of a row that one program has at hand.
LONGEST = 4096
#: Rows that the sum looks at together.
TOGETHER = 1024


class Kept(NamedTuple):
    """What forward leaves for backward, besides its arguments."""

    statistics: Tensor  # (3, rows): m, log Σ e^(x - m), Σ q
    inverse: Tensor  # 1/N, one number


def takes(x: Tensor, target: Tensor, w: Tensor | None) -> bool:
    """Whether the kernels take logits (rows, classes) with classes side by side, their classes, and weights of classes."""
    return (
        gpu.takes(x.device)
        and x.dim() == 2
        and x.dtype in ELEMENTS
        and x.numel() > 0
        and x.stride(1) == 1
        and target.dtype == torch.int64
        and target.shape == x.shape[:1]
        and target.is_contiguous()
        and target.device == x.device
        and (w is None or (w.shape == x.shape[1:] and w.dtype == x.dtype and w.device == x.device and w.stride(0) == 1))
    )


def cross_entropy(
    x: Tensor, target: Tensor, w: Tensor | None, ignored: int, reduction: str, smoothing: float
) -> tuple[Tensor, Kept]:
    """The loss in the dtype of x, and what backward needs. A target that is no class makes it NaN."""
    rows = len(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = torch.empty((3, rows), dtype=wide, device=x.device)
    losses, shares, inverse = (torch.empty(n, dtype=wide, device=x.device) for n in (rows, rows, 1))
    kernel = _forward(*_kind(x, w, smoothing))
    tensors = [x, target, *([] if w is None else [w]), losses, shares, statistics]
    kernel.launch(x.device, rows, tensors, _numbers(x, ignored, smoothing))
    if reduction == "none":
        inverse.fill_(1)
        return losses.to(x.dtype), Kept(statistics, inverse)
    out = torch.empty((), dtype=x.dtype, device=x.device)
    _sum(x.dtype).launch(x.device, 1, [losses, shares, out, inverse], (rows, int(reduction == "mean")))
    return out, Kept(statistics, inverse)


def cross_entropy_gradient(
    g: Tensor,
    x: Tensor,
    target: Tensor,
    w: Tensor | None,
    kept: Kept,
    ignored: int,
    reduction: str,
    smoothing: float,
    out: Tensor | None = None,
) -> Tensor:
    """∂L/∂x, times what comes in, which has the loss's shape. out: where to, x itself too; contiguous."""
    rows, classes = x.shape
    grad = torch.empty((rows, classes), dtype=x.dtype, device=x.device) if out is None else out
    block, *_ = kind = _kind(x, w, smoothing)
    kernel = _backward(*kind, reduction == "none")
    tensors = [x, grad, target, *([] if w is None else [w]), *kept, g.to(kept.inverse.dtype).contiguous()]
    kernel.launch(x.device, rows * -(-classes // block), tensors, _numbers(x, ignored, smoothing))
    return grad


def _kind(x: Tensor, w: Tensor | None, smoothing: float) -> tuple[int, torch.dtype, bool, bool, bool]:
    """What there are kernels of: a row's block, the dtype, whether rows are even, and what is asked for."""
    block = min(LONGEST, 1 << max(x.shape[1] - 1, 15).bit_length())
    return block, x.dtype, _is_even(x), w is not None, smoothing != 0


def _is_even(x: Tensor) -> bool:
    """Whether every row begins and ends at a multiple of 16 bytes and 16 elements, so that accesses can be so wide."""
    return x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0


def _numbers(x: Tensor, ignored: int, smoothing: float) -> tuple[float, ...]:
    """Even sizes are given in sixteens: the compiler sees the product."""
    rows, classes = x.shape
    unit = 16 if _is_even(x) else 1
    return rows, classes // unit, x.stride(0) // unit, ignored, 1 - smoothing, smoothing / classes


#: The kernels' numbers, in their order; hard and smooth are of the type that is computed in.
NUMBERS = {"rows": "i64", "classes": "i64", "stride": "i64", "ignored": "i64"}
EVEN = """
    classes = classes * 16
    stride = stride * 16"""


def _q(weighted: bool) -> str:
    """What each class of a row has of q besides the target's own: smoothing, by its weight."""
    return "smooth * tl.load(weight + o, mask=there, other=0.0).to(T)" if weighted else "tl.full((BLOCK,), smooth, T)"


def _of_class(weighted: bool) -> str:
    return "tl.load(weight + y, mask=known, other=0.0).to(T)" if weighted else "tl.full((), 1.0, T)"


@functools.cache
def _forward(block: int, dtype: torch.dtype, even: bool, weighted: bool, smoothed: bool) -> gpu.Kernel:
    type_, element = compute_type([dtype]), ELEMENTS[dtype]
    arguments = {"x": f"*{element}", "target": "*i64"} | ({"weight": f"*{element}"} if weighted else {})
    arguments |= dict.fromkeys(("losses", "shares", "statistics"), f"*{type_}")
    arguments |= NUMBERS | {"hard": type_, "smooth": type_}
    more = f"""
        q = tl.where(there, {_q(weighted)}, 0.0)
        d = d + tl.where(total == 0.0, 0.0, total * (before - about)) + tl.sum(tl.where(q == 0.0, 0.0, q * (v - about)))
        total = total + tl.sum(q)"""
    text = f"""{EVEN if even else ""}
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    y = tl.load(target + row)
    top = tl.full((), float("-inf"), T)
    about = tl.full((), 0.0, T)
    s = tl.full((), 0.0, T)
    total = tl.full((), 0.0, T)
    d = tl.full((), 0.0, T)
    for c in range(0, classes, BLOCK):
        o = c + tl.arange(0, BLOCK)
        there = o < classes
        v = tl.load(x + o, mask=there, other=float("-inf")).to(T)
        before = about
        top = tl.maximum(top, tl.max(v))
        about = tl.where(top == float("-inf"), 0.0, top)
        s = tl.where(s == 0.0, 0.0, s * libdevice.exp(before - about))
        s += tl.sum(libdevice.exp(v - about)){more if smoothed else ""}
    log_s = libdevice.log(s)
    counts = y != ignored
    known = (y >= 0) & (y < classes)
    share = {_of_class(weighted)}
    own = hard * share
    at_class = tl.load(x + y, mask=known, other=0.0).to(T)
    loss = log_s * total - d + tl.where(own == 0.0, 0.0, own * (log_s - (at_class - top)))
    loss = tl.where(known, loss, float("nan"))
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    tl.store(shares + row, tl.where(counts, share, -1.0))
    tl.store(statistics + row, top)
    tl.store(statistics + rows + row, log_s)
    tl.store(statistics + 2 * rows + row, total)
"""
    return _kernel("cross_entropy", arguments, text, type_, block, int(even))


@functools.cache
def _sum(dtype: torch.dtype) -> gpu.Kernel:
    """Σ ℓ/N and 1/N: N = 1, or for a mean Σ of the shares; 1 where every sample is ignored, which has a share of -1."""
    type_, element = compute_type([dtype]), ELEMENTS[dtype]
    arguments = {"losses": f"*{type_}", "shares": f"*{type_}", "out": f"*{element}", "inverse": f"*{type_}"}
    arguments |= {"rows": "i64", "mean": "i32"}
    text = f"""
    total = tl.full((), 0.0, tl.float64)
    n = tl.full((), 0.0, tl.float64)
    counted = tl.full((), 0, tl.int32)
    for r in range(0, rows, BLOCK):
        o = r + tl.arange(0, BLOCK)
        share = tl.load(shares + o, mask=o < rows, other=-1.0).to(tl.float64)
        total += tl.sum(tl.load(losses + o, mask=o < rows, other=0.0).to(tl.float64))
        n += tl.sum(tl.where(share >= 0.0, share, 0.0))
        counted += tl.sum((share >= 0.0).to(tl.int32))
    n = tl.where((mean == 0) | (counted == 0), 1.0, n)
    tl.store(out, (total / n).to(T).to({TYPES[element]}))
    tl.store(inverse, (1.0 / n).to(T))
"""
    return _kernel("cross_entropy_sum", arguments, text, type_, TOGETHER, 0)


@functools.cache
def _backward(block: int, dtype: torch.dtype, even: bool, weighted: bool, smoothed: bool, by_row: bool) -> gpu.Kernel:
    type_, element = compute_type([dtype]), ELEMENTS[dtype]
    arguments = {"x": f"*{element}", "grad": f"*{element}", "target": "*i64"}
    arguments |= ({"weight": f"*{element}"} if weighted else {}) | {"statistics": f"*{type_}", "inverse": f"*{type_}"}
    arguments |= {"g": f"*{type_}"}
    arguments |= NUMBERS | {"hard": type_, "smooth": type_}
    text = f"""{EVEN if even else ""}
    blocks = (classes + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    o = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    there = o < classes
    y = tl.load(target + row)
    known = (y >= 0) & (y < classes)
    top = tl.load(statistics + row)
    log_s = tl.load(statistics + rows + row)
    share = tl.load(g{" + row" if by_row else ""}).to(T) * tl.load(inverse)
    own = tl.where(known, hard * {_of_class(weighted)}, float("nan"))
    v = tl.load(x + row * stride + o, mask=there, other=float("-inf")).to(T)
    p = libdevice.exp((v - top) - log_s)
    slope = share * (own{" + tl.load(statistics + 2 * rows + row)" if smoothed else ""}) * p
    slope = tl.where(o == y, slope - share * own, slope)
    {"slope = slope - share * " + _q(weighted) if smoothed else ""}
    slope = tl.where(y != ignored, slope, 0.0)
    tl.store(grad + row * classes + o, slope.to({TYPES[element]}), mask=there)
"""
    return _kernel("cross_entropy_backward", arguments, text, type_, block, 2 * even)


def _kernel(name: str, arguments: dict[str, str], text: str, type_: str, block: int, aligned: int) -> gpu.Kernel:
    """In the text T stands for the type that is computed in, BLOCK for how many elements are at hand."""
    text = re.sub(r"\bBLOCK\b", str(block), re.sub(r"\bT\b", TYPES[type_], text))
    tensors = sum(each.startswith("*") for each in arguments.values())
    return gpu.Kernel(
        name, signature(name, arguments) + text, tensors, aligned=aligned, warps=8 if block >= 2048 else 4
    )
