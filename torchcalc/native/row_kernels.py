"""Kernels of rows for GPUs: cross-entropy in one pass over the logits forward and one backward, as ``csrc/rows.cpp`` on CPU.
They compute equations (1) and (3) of :mod:`torchcalc.losses.cross_entropy`.

Forward is a program for each row, and one that sums what they found; backward a program for each block of a row. Of images,
(N, C, *), whose samples lie side by side and not their classes, it is a program for each block of samples either way. A row's
largest logit m, log Σ e^(x - m) and Σ q are what is kept. No call waits for the device: the mean's divisor stays on it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcalc.formula.triton import ELEMENTS, TYPES, compute_type, signature
from torchcalc.native import gpu, pointwise

__all__ = ["Kept", "cross_entropy", "cross_entropy_gradient", "slopes_", "takes"]

#: The longest block of a row that one program has at hand.
LONGEST = 4096
#: Rows that the sum looks at together; and rows above which torch sums them, by many programs.
TOGETHER, MOST_SUMMED = 1024, 1 << 15


BY_ROW = ("none", "wide")


class Kept(NamedTuple):
    """What forward leaves for backward, besides its arguments."""

    statistics: Tensor  # (3, rows): m, log Σ e^(x - m), Σ q
    inverse: Tensor  # 1/N, one number


def takes(x: Tensor, target: Tensor, w: Tensor | None) -> bool:
    """Whether the kernels take logits (rows, classes) with classes side by side, or contiguous (N, C, *), their classes, and
    weights of classes."""
    return (
        gpu.takes(x.device)
        and x.dim() >= 2
        and x.dtype in ELEMENTS
        and x.numel() > 0
        and (x.stride(1) == 1 if x.dim() == 2 else x.is_contiguous())
        and target.dtype == torch.int64
        and target.shape == x.shape[:1] + x.shape[2:]
        and target.is_contiguous()
        and target.device == x.device
        and (
            w is None or (w.shape == x.shape[1:2] and w.dtype == x.dtype and w.device == x.device and w.stride(0) == 1)
        )
    )


def cross_entropy(
    x: Tensor, target: Tensor, w: Tensor | None, ignored: int, reduction: str, smoothing: float, z_loss: float = 0.0
) -> tuple[Tensor, Kept]:
    """The loss in the dtype of x, and what backward needs. A target that is no class makes it NaN.

    reduction: torch's, or "wide": each sample's loss, in the dtype that is computed in.
    """
    rows = target.numel()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = torch.empty((3, rows), dtype=wide, device=x.device)
    losses, shares, inverse = (torch.empty(n, dtype=wide, device=x.device) for n in (rows, rows, 1))
    tensors = [x, target, *([] if w is None else [w]), losses, shares, statistics]
    if x.dim() > 2:
        kernel, programs, numbers = _of_images(_forward_images, x, w, ignored, smoothing, z_loss)
        kernel.launch(x.device, programs, tensors, numbers)
    else:
        kind = _kind(x, w, smoothing)
        _forward(*kind).launch(x.device, rows, tensors, _numbers(kind, x, (x,), ignored, smoothing, z_loss))
    if reduction in BY_ROW:
        inverse.fill_(1)
        losses = losses.view(target.shape)
        return losses if reduction == "wide" else losses.to(x.dtype), Kept(statistics, inverse)
    if rows > MOST_SUMMED:
        counts = shares >= 0
        n = torch.where(counts, shares, 0).sum(dtype=torch.float64) if reduction == "mean" else 1
        inverse = torch.where(counts.any(), 1 / n, 1.0).to(wide).view(1) if reduction == "mean" else inverse.fill_(1)
        return (losses.sum(dtype=torch.float64) * inverse[0]).to(x.dtype), Kept(statistics, inverse)
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
    z_loss: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """∂L/∂x, times what comes in, which has the loss's shape. out: where to, x itself too."""
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    tensors = [x, grad, target, *([] if w is None else [w]), *kept, g.to(kept.inverse.dtype).contiguous()]
    if x.dim() > 2:
        make = functools.partial(_backward_images, by_row=reduction in BY_ROW)
        kernel, programs, numbers = _of_images(make, x, w, ignored, smoothing, z_loss)
        kernel.launch(x.device, programs, tensors, numbers)
        return grad
    kind = _kind(x, w, smoothing, grad)
    programs = len(x) * -(-x.shape[1] // kind.block)
    numbers = _numbers(kind, x, (x, grad), ignored, smoothing, z_loss)
    _backward(*kind, reduction in BY_ROW).launch(x.device, programs, tensors, numbers)
    return grad


#: Samples of an image that one program has at hand.
SAMPLES = 512


def _of_images(
    make: Callable[..., gpu.Kernel], x: Tensor, w: Tensor | None, ignored: int, smoothing: float, z_loss: float
) -> tuple[gpu.Kernel, int, tuple[float, ...]]:
    """The kernel for contiguous (N, C, *), how many programs it takes, and its numbers."""
    images, classes = x.shape[:2]
    inner = x.numel() // (images * classes)
    numbers = images * inner, classes, inner, ignored, 1 - smoothing, smoothing / classes, z_loss
    return make(x.dtype, w is not None, smoothing != 0), images * -(-inner // SAMPLES), numbers


def slopes_(x: Tensor, lse: Tensor, factor: Tensor, own: Tensor, place: Tensor) -> Tensor:
    """x becomes factor·e^(x - lse), less own at place where that is one of its columns: (2) of by_classes.py."""
    kind = _kind(x, None, 0.0)
    programs = len(x) * -(-x.shape[1] // kind.block)
    rows, classes, stride = _numbers(kind, x, (x,), 0, 0.0, 0.0)[:3]
    tensors = [x, place.contiguous(), *(a.to(lse.dtype).contiguous() for a in (lse, factor, own))]
    _slopes(*kind[:4]).launch(x.device, programs, tensors, (rows, classes, stride))
    return x


class Kind(NamedTuple):
    """What there are kernels of."""

    block: int  # of a row
    dtype: torch.dtype
    even: bool  # every row begins at a multiple of 16 bytes and of 16 elements,
    whole: bool  # and has a multiple of 16 classes: so wide accesses can be
    weighted: bool
    smoothed: bool


def _kind(x: Tensor, w: Tensor | None, smoothing: float, *others: Tensor) -> Kind:
    block = min(LONGEST, 1 << max(x.shape[1] - 1, 15).bit_length())
    even = all(t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, *others))
    return Kind(block, x.dtype, even, x.shape[1] % 16 == 0, w is not None, smoothing != 0)


def _numbers(
    kind: Kind, x: Tensor, strided: Sequence[Tensor], ignored: int, smoothing: float, z_loss: float
) -> tuple[float, ...]:
    """Sizes that are known to be multiples of 16 are given in sixteens: the compiler sees the product."""
    rows, classes = x.shape
    strides = [t.stride(0) // (16 if kind.even else 1) for t in strided]
    return rows, classes // (16 if kind.whole else 1), *strides, ignored, 1 - smoothing, smoothing / classes, z_loss


_IMAGES = """
    blocks = (inner + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    i = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    there = i < inner
    x += image * classes * inner
    row = image * inner + i
    y = tl.load(target + row, mask=there, other=ignored)
    known = (y >= 0) & (y < classes)
    counts = y != ignored
"""


def _image_arguments(tensors: dict[str, str], type_: str) -> dict[str, str]:
    numbers = dict.fromkeys(("rows", "classes", "inner", "ignored"), "i64")
    return tensors | numbers | {"hard": type_, "smooth": type_, "z": type_}


def _of_one_class(weighted: bool) -> str:
    """What class c has of q besides the target's own."""
    return "smooth * tl.load(weight + c).to(T)" if weighted else "smooth"


@functools.cache
def _forward_images(dtype: torch.dtype, weighted: bool, smoothed: bool) -> gpu.Kernel:
    type_, element = compute_type([dtype]), ELEMENTS[dtype]
    tensors = {"x": f"*{element}", "target": "*i64"} | ({"weight": f"*{element}"} if weighted else {})
    tensors |= dict.fromkeys(("losses", "shares", "statistics"), f"*{type_}")
    smooth = f"""
        q = {_of_one_class(weighted)}
        d = d + tl.where(total == 0.0, 0.0, total * (before - about)) + tl.where(q == 0.0, 0.0, q * (v - about))
        total = total + q"""
    text = f"""{_IMAGES}
    top = tl.full((BLOCK,), float("-inf"), T)
    about = tl.full((BLOCK,), 0.0, T)
    s = tl.full((BLOCK,), 0.0, T)
    total = tl.full((BLOCK,), 0.0, T)
    d = tl.full((BLOCK,), 0.0, T)
    at_class = tl.full((BLOCK,), 0.0, T)
    for c in range(0, classes):
        v = tl.load(x + c * inner + i, mask=there, other=0.0).to(T)
        before = about
        top = tl.maximum(top, v, propagate_nan=tl.PropagateNan.ALL)
        about = tl.where(top == float("-inf"), 0.0, top)
        s = tl.where(s == 0.0, 0.0, s * libdevice.exp(before - about)) + libdevice.exp(v - about)
        at_class = tl.where(y == c, v, at_class){smooth if smoothed else ""}
    log_s = libdevice.log(s)
    share = {_of_class(weighted)}
    own = hard * share
    loss = log_s * total - d + tl.where(own == 0.0, 0.0, own * (log_s - (at_class - top)))
    lse = top + log_s
    loss += tl.where(z == 0.0, 0.0, z * lse * lse)
    loss = tl.where(known, loss, float("nan"))
    tl.store(losses + row, tl.where(counts, loss, 0.0), mask=there)
    tl.store(shares + row, tl.where(counts, share, -1.0), mask=there)
    tl.store(statistics + row, top, mask=there)
    tl.store(statistics + rows + row, log_s, mask=there)
    tl.store(statistics + 2 * rows + row, total, mask=there)
"""
    return _kernel("cross_entropy_images", _image_arguments(tensors, type_), text, type_, SAMPLES, 0)


@functools.cache
def _backward_images(dtype: torch.dtype, weighted: bool, smoothed: bool, by_row: bool) -> gpu.Kernel:
    type_, element = compute_type([dtype]), ELEMENTS[dtype]
    tensors = {"x": f"*{element}", "grad": f"*{element}", "target": "*i64"}
    tensors |= ({"weight": f"*{element}"} if weighted else {}) | {"statistics": f"*{type_}", "inverse": f"*{type_}"}
    tensors |= {"g": f"*{type_}"}
    text = f"""{_IMAGES}
    grad += image * classes * inner
    top = tl.load(statistics + row, mask=there, other=0.0)
    log_s = tl.load(statistics + rows + row, mask=there, other=0.0)
    share = tl.load(g{" + row, mask=there, other=0.0" if by_row else ""}).to(T) * tl.load(inverse)
    own = tl.where(known, hard * {_of_class(weighted)}, float("nan"))
    more = tl.where(z == 0.0, 0.0, 2.0 * z * (top + log_s))
    factor = share * (own{" + tl.load(statistics + 2 * rows + row, mask=there, other=0.0)" if smoothed else ""} + more)
    for c in range(0, classes):
        v = tl.load(x + c * inner + i, mask=there, other=0.0).to(T)
        slope = factor * libdevice.exp((v - top) - log_s)
        slope = tl.where(y == c, slope - share * own, slope)
        {f"slope = slope - share * {_of_one_class(weighted)}" if smoothed else ""}
        slope = tl.where(counts, slope, 0.0)
        tl.store(grad + c * inner + i, slope.to({TYPES[element]}), mask=there)
"""
    return _kernel("cross_entropy_images_backward", _image_arguments(tensors, type_), text, type_, SAMPLES, 0)


_entered: set[Any] = set()


def enter(x: Tensor, target: Tensor, w: Tensor | None, ignored: int, reduction: str, smoothing: float) -> None:
    """Compile the kernels for such arguments, and tell the nodes, which launch them from then on."""
    kind, by_row = _kind(x, w, smoothing), reduction in BY_ROW
    key = kind, by_row, x.device
    if key in _entered or gpu.capturing(x.device) or (nodes := pointwise.rows()) is None:
        return
    _entered.add(key)
    with torch.no_grad():
        row = x[:1]
        loss, kept = cross_entropy(row, target[:1], w, ignored, reduction, smoothing)
        cross_entropy_gradient(loss, row, target[:1], w, kept, ignored, reduction, smoothing)
        cross_entropy(row, target[:1], w, ignored, "sum", smoothing)
    # The gradient is contiguous: its rows are even where they are whole.
    backward = kind._replace(even=kind.even and kind.whole)
    handles = [each.handle(x.device) for each in (_forward(*kind), _sum(x.dtype), _backward(*backward, by_row))]
    if None not in handles:
        block, dtype, *flags = kind
        nodes.enter_rows(dtype, x.device.index, block, *flags, by_row, *handles)


def _arguments(kind: Kind, tensors: dict[str, str], strides: Sequence[str], type_: str) -> tuple[dict[str, str], str]:
    """Those of a kernel; and the lines that make whole numbers of sixteens."""
    numbers = dict.fromkeys(("rows", "classes", *strides, "ignored"), "i64")
    sixteens = (["classes"] if kind.whole else []) + (list(strides) if kind.even else [])
    lines = "".join(f"\n    {x} = {x} * 16" for x in sixteens)
    return tensors | numbers | {"hard": type_, "smooth": type_, "z": type_}, lines


def _q(weighted: bool, mask: str = "") -> str:
    """What each class of a row has of q besides the target's own: smoothing, by its weight."""
    return f"smooth * tl.load(weight + o{mask}).to(T)" if weighted else "tl.full((BLOCK,), smooth, T)"


def _of_class(weighted: bool) -> str:
    return "tl.load(weight + y, mask=known, other=0.0).to(T)" if weighted else "tl.full((), 1.0, T)"


@functools.cache
def _forward(block: int, dtype: torch.dtype, even: bool, whole: bool, weighted: bool, smoothed: bool) -> gpu.Kernel:
    kind = Kind(block, dtype, even, whole, weighted, smoothed)
    type_, element = compute_type([dtype]), ELEMENTS[dtype]
    tensors = {"x": f"*{element}", "target": "*i64"} | ({"weight": f"*{element}"} if weighted else {})
    tensors |= dict.fromkeys(("losses", "shares", "statistics"), f"*{type_}")
    arguments, sixteens = _arguments(kind, tensors, ("stride",), type_)

    def block_of_row(mask: str, there: str) -> str:
        """Lines for the block at c."""
        smooth = f"""
        q = {there % _q(weighted, mask and ", mask=there, other=0.0")}
        d = d + tl.where(total == 0.0, 0.0, total * (before - about)) + tl.sum(tl.where(q == 0.0, 0.0, q * (v - about)))
        total = total + tl.sum(q)"""
        return f"""
        v = tl.load(x + o{mask}).to(T)
        before = about
        top = tl.maximum(top, tl.max(v))
        about = tl.where(top == float("-inf"), 0.0, top)
        s = tl.where(s == 0.0, 0.0, s * libdevice.exp(before - about))
        s += tl.sum(libdevice.exp(v - about)){smooth if smoothed else ""}"""

    text = f"""{sixteens}
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    y = tl.load(target + row)
    top = tl.full((), float("-inf"), T)
    about = tl.full((), 0.0, T)
    s = tl.full((), 0.0, T)
    total = tl.full((), 0.0, T)
    d = tl.full((), 0.0, T)
    last = classes // BLOCK * BLOCK
    for c in range(0, last, BLOCK):
        o = c + tl.arange(0, BLOCK){block_of_row("", "%s")}
    if last < classes:
        o = last + tl.arange(0, BLOCK)
        there = o < classes{block_of_row(', mask=there, other=float("-inf")', "tl.where(there, %s, 0.0)")}
    log_s = libdevice.log(s)
    counts = y != ignored
    known = (y >= 0) & (y < classes)
    share = {_of_class(weighted)}
    own = hard * share
    at_class = tl.load(x + y, mask=known, other=0.0).to(T)
    loss = log_s * total - d + tl.where(own == 0.0, 0.0, own * (log_s - (at_class - top)))
    lse = top + log_s
    loss += tl.where(z == 0.0, 0.0, z * lse * lse)
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
def _backward(
    block: int, dtype: torch.dtype, even: bool, whole: bool, weighted: bool, smoothed: bool, by_row: bool
) -> gpu.Kernel:
    kind = Kind(block, dtype, even, whole, weighted, smoothed)
    type_, element = compute_type([dtype]), ELEMENTS[dtype]
    tensors = {"x": f"*{element}", "grad": f"*{element}", "target": "*i64"}
    tensors |= ({"weight": f"*{element}"} if weighted else {}) | {"statistics": f"*{type_}", "inverse": f"*{type_}"}
    tensors |= {"g": f"*{type_}"}
    arguments, sixteens = _arguments(kind, tensors, ("stride", "grad_stride"), type_)

    def block_of_row(mask: str, load: str, zero: str) -> str:
        return f"""
        v = tl.load(x + o{load}).to(T)
        slope = factor * libdevice.exp((v - top) - log_s)
        slope = tl.where(o == y, slope - share * own, slope)
        {f"slope = slope - share * {_q(weighted, zero)}" if smoothed else ""}
        slope = tl.where(y != ignored, slope, 0.0)
        tl.store(grad + o, slope.to({TYPES[element]}){mask})"""

    text = f"""{sixteens}
    blocks = (classes + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    start = (program % blocks) * BLOCK
    x += row * stride
    grad += row * grad_stride
    o = start + tl.arange(0, BLOCK)
    y = tl.load(target + row)
    known = (y >= 0) & (y < classes)
    top = tl.load(statistics + row)
    log_s = tl.load(statistics + rows + row)
    share = tl.load(g{" + row" if by_row else ""}).to(T) * tl.load(inverse)
    own = tl.where(known, hard * {_of_class(weighted)}, float("nan"))
    more = tl.where(z == 0.0, 0.0, 2.0 * z * (top + log_s))
    factor = share * (own{" + tl.load(statistics + 2 * rows + row)" if smoothed else ""} + more)
    if start + BLOCK <= classes:{block_of_row("", "", "")}
    else:
        there = o < classes{block_of_row(", mask=there", ', mask=there, other=float("-inf")', ", mask=there, other=0.0")}
"""
    return _kernel("cross_entropy_backward", arguments, text, type_, block, 2 * even)


@functools.cache
def _slopes(block: int, dtype: torch.dtype, even: bool, whole: bool) -> gpu.Kernel:
    type_, element = compute_type([dtype]), ELEMENTS[dtype]
    arguments = {"x": f"*{element}", "place": "*i64"} | dict.fromkeys(("lse", "factor", "own"), f"*{type_}")
    arguments |= dict.fromkeys(("rows", "classes", "stride"), "i64")
    sixteens = "".join(f"\n    {x} = {x} * 16" for x in ("classes",) * whole + ("stride",) * even)

    def block_of_row(mask: str, load: str) -> str:
        return f"""
        v = tl.load(x + o{load}).to(T)
        slope = tl.where(f == 0.0, 0.0, f * libdevice.exp(v - about))
        slope = tl.where(o == y, slope - at_target, slope)
        tl.store(x + o, slope.to({TYPES[element]}){mask})"""

    text = f"""{sixteens}
    blocks = (classes + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    start = (program % blocks) * BLOCK
    x += row * stride
    o = start + tl.arange(0, BLOCK)
    y = tl.load(place + row)
    about = tl.load(lse + row)
    f = tl.load(factor + row)
    at_target = tl.load(own + row)
    if start + BLOCK <= classes:{block_of_row("", "")}
    else:
        there = o < classes{block_of_row(", mask=there", ', mask=there, other=float("-inf")')}
"""
    return _kernel("cross_entropy_slopes", arguments, text, type_, block, int(even))


def _kernel(name: str, arguments: dict[str, str], text: str, type_: str, block: int, aligned: int) -> gpu.Kernel:
    """In the text T stands for the type that is computed in, BLOCK for how many elements are at hand."""
    text = re.sub(r"\bBLOCK\b", str(block), re.sub(r"\bT\b", TYPES[type_], text))
    tensors = sum(each.startswith("*") for each in arguments.values())
    return gpu.Kernel(
        name, signature(name, arguments) + text, tensors, aligned=aligned, warps=8 if block >= 2048 else 4
    )
