"""A function of each element by itself, on a dense grid around 0 and a geometric one over 22 orders of magnitude."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import COARSE, FINE, pattern
from torchcalc.testing.differences import NEAREST, Slopes, slopes_along
from torchcalc.testing.graph import custom
from torchcalc.testing.layouts import alike
from torchcalc.testing.numeric import flat, replaced, slack
from torchcalc.testing.registry import Skip
from torchcalc.testing.report import Finding, Verdict
from torchcalc.testing.subject import CLEAR, Subject


def blame(
    subject: Subject, inputs: Sequence[Any], needed: Sequence[int], v: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Verdict:
    """An error, but a note where the function has the gradient of its reference."""
    if subject.reference is None:
        return "error"
    try:
        _, right = subject.gradients(inputs, needed, v, fn=subject.reference)
    except CLEAR:
        return "error"
    pairs = [(g, r) for g, r in zip(grads, right, strict=True) if g is not None and r is not None]
    return "note" if all(torch.allclose(g, r, rtol=1e-9, equal_nan=True) for g, r in pairs) else "error"


def pointwise(subject: Subject, inputs: Sequence[Any], i: int) -> bool:
    """Whether each output is a function of the element at its own place of input i, and of those of its like."""
    x = inputs[i]
    like = [k for k, y in enumerate(inputs) if isinstance(y, Tensor) and y.shape == x.shape]
    if subject.random or x.numel() < 2 or i in subject.complex:
        return False
    if like[-1] >= subject.handed:  # a module's own parameter: nobody gives it another shape
        return False

    def changed(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return subject.call(*(change(y) if k in like else y for k, y in enumerate(inputs)))

    half = x.numel() // 2
    try:
        with torch.no_grad():
            whole = changed(lambda y: y)
            back = changed(lambda y: y.reshape(-1).flip(0))
            part = changed(lambda y: y.reshape(-1)[:half])
    except Exception:  # no other shape works, so it is something else
        return False
    return all(
        w.shape == x.shape
        and alike(b.flip(0), w.reshape(-1), slack(subject, w))
        and alike(p, w.reshape(-1)[:half], slack(subject, w))
        for w, b, p in zip(whole, back, part, strict=True)
    )


def grid(like: Tensor) -> Tensor:
    """A dense grid around 0, a geometric one, and what lies next to powers of two, where integers and halves end."""
    near = (torch.arange(-1200, 1200, dtype=torch.float64, device="cpu") + 0.4142) / 100
    wide = 10.0 ** (torch.arange(-480, 400, dtype=torch.float64, device="cpu") / 40 + 0.0031)
    return torch.cat([near, wide, -wide]).to(like.device, like.dtype).sort()[0]


def reach(subject: Subject, inputs: Sequence[Any], i: int) -> float:
    """How large inputs may be: some functions loop as often as |x| is large, as torch.polygamma does below 0."""

    def took(size: float) -> float:
        end = 0.97123 * size  # no whole number, at which such a function may be done at once
        x = torch.linspace(-end, end, inputs[i].numel(), dtype=inputs[i].dtype, device=inputs[i].device)
        start = time.process_time()
        subject.gradients(replaced(inputs, i, x.view_as(inputs[i])), (i,))
        return time.process_time() - start

    size, shortest = 10.0, math.inf
    while size < 1e10:
        try:
            shortest = min(shortest, took(size))
            if min(took(size), took(size)) > 2e-4 + 4 * shortest:
                return size / 100
        except CLEAR:
            break
        size *= 10
    return size


def on_grid(subject: Subject, inputs: Sequence[Any], i: int) -> Finding:
    """J'v at every point of the grid; the inputs of the same shape take the example's values in turn, at two sizes."""
    x = grid(inputs[i])
    x = x[x.abs() <= reach(subject, inputs, i)]
    at: list[Any] = list(inputs)
    for k, y in enumerate(inputs):
        if isinstance(y, Tensor) and y.shape == inputs[i].shape:
            turns = y.reshape(-1)[torch.arange(len(x), device="cpu") * 7 % y.numel()]
            sizes = (
                turns.new_tensor([0.3, 1, 3, 1]).repeat(len(x) // 4 + 1)[: len(x)] if k in subject.wrt and k != i else 1
            )
            at[k] = turns * sizes
    at[i] = x
    try:
        outputs, (grad,) = subject.gradients(at, (i,))
    except CLEAR as error:
        raise Skip(f"refuses inputs of all sizes: {str(error).partition(chr(10))[0]}") from error
    incoming = subject.incoming(outputs)
    slopes = each_slope(subject, at, i, len(outputs))
    value, allowed, use = x * 0, x * 0, torch.ones_like(x, dtype=torch.bool)
    for k, v in enumerate(incoming):
        part = Slopes(*(getattr(slopes, name)[k] for name in Slopes.__dataclass_fields__))
        value = value + torch.where(part.usable, v * part.value, 0)
        own = 10 * part.error + 1e5 * torch.finfo(x.dtype).eps * part.value.abs() + torch.finfo(x.dtype).tiny
        allowed = allowed + torch.where(part.usable, v.abs() * own, 0)
        use = use & part.usable
    grad = torch.zeros_like(x) if grad is None else grad
    use = use & (allowed <= 1e-2 * value.abs() + 1e-9) & (value.abs() < 1e30)
    if not use.any():
        return Finding("", "not checked", diagnosis="no difference is exact enough on the grid")
    gap = torch.where(use, (grad - value).abs() / torch.maximum(value.abs(), 100 * allowed), 0).nan_to_num(
        torch.inf, torch.inf
    )
    bad = use & (((grad - value).abs() > allowed) | ~grad.isfinite()) & (gap > FINE)
    if bad.any():
        bad = bad & ~confirmed(subject, at, i, incoming, grad, bad)
        gap = torch.where(bad, gap, 0)
    if not bad.any():
        return Finding("", figure=f"{int(use.sum())} of {len(x)} points")
    worst = int(torch.where(bad, gap, 0).argmax())
    at_worst, g, v_worst, bar = (float(t[worst]) for t in (x, grad, value, allowed))
    text = (
        f"gradient of {subject.label(i)} on a grid: {int(bad.sum())} of {int(use.sum())} points differ; worst at input "
        f"{at_worst:.6g}: analytic {g:.10g}, numeric {v_worst:.10g} ± {bar:.1e}"
    )
    figure, details = (
        f"{abs(g - v_worst):.1e} of {bar:.1e} allowed",
        dict(input=at_worst, analytic=g, numeric=v_worst, error_bar=bar),
    )
    if float(gap.max()) < COARSE:
        return Finding("", "note", figure, text, f"right to {float(gap.max()):.0e} only", details)
    first = by_place(subject, at, i, grad, bad)
    if first:
        cause = f"elements from number {first} on are wrong"
        return Finding("", blame(subject, at, (i,), incoming, (grad,)), figure, text, cause, details)
    where = interval(x, bad, use)
    inside = pattern(grad[bad], value[bad], allowed[bad]) if bool(grad[bad].isfinite().all()) else "not finite"
    cause = f"only {where}" + (f": {inside}" if inside else "") if where else inside
    return Finding("", blame(subject, at, (i,), incoming, (grad,)), figure, text, cause, details)


def confirmed(
    subject: Subject, at: Sequence[Any], i: int, incoming: Sequence[Tensor], grad: Tensor, bad: Tensor
) -> Tensor:
    """Where tiny steps, of a size at which the gradient would change the function in its fifth digit, have its slope.

    Larger ones mislead where the function is chaotic, as the steps of a Newton iteration outside of its domain.
    """

    def f(z: Tensor) -> Tensor:
        with torch.no_grad():
            outputs = subject.call(*replaced(at, i, z))
        return sum((v * y for v, y in zip(incoming, outputs, strict=True)), z * 0)

    x, right = at[i], bad & grad.isfinite() & (grad != 0)
    size, least = f(x).abs(), 1e3 * torch.finfo(x.dtype).eps * x.abs()
    torchs = not custom(subject.call(*subject.leaves(at, (i,))))
    for part in (1e-5, 3e-6):
        h = part * size / grad.abs().clamp(min=1e-300)
        slope = (f(x + h) - f(x - h)) / ((x + h) - (x - h))
        close = (slope - grad).abs() <= 1e-3 * grad.abs()
        right = right & torch.where(h > least, close, torchs)  # no smaller step exists: nothing to say against torch
    return right


def by_place(subject: Subject, at: Sequence[Any], i: int, grad: Tensor, bad: Tensor) -> int:
    """The first element from which on the gradient goes by the place of an element, not by its value; 0 if by value."""
    n = len(grad)
    back = [y.flip(0) if isinstance(y, Tensor) and y.shape == grad.shape else y for y in at]
    _, (turned,) = subject.gradients(back, (i,), incoming=[v.flip(0) for v in subject.incoming(subject.call(*at))])
    if turned is None:
        return 0
    moved = (turned.flip(0) - grad).abs() > 1e-6 * grad.abs() + torch.finfo(grad.dtype).tiny
    first = int(bad.nonzero()[0])
    return first if 0 < first < n and bool(moved[bad].any()) and bool(moved.any()) else 0


def each_slope(subject: Subject, at: Sequence[Any], i: int, outputs: int) -> Slopes:
    """The slope of each output at each point, of shape (outputs, points), with steps relative to max(|x|, 1) and to x."""
    x = at[i]

    def f(z: Tensor) -> Tensor:
        with torch.no_grad():
            return flat(subject.call(*replaced(at, i, z)))

    best: Slopes | None = None
    for u in (x.abs().clamp(min=1), torch.where(x.abs() < 1, x.abs(), (NEAREST * x.abs()).clamp(min=1))):
        jitter = (torch.finfo(x.dtype).eps * (x / u).abs()).repeat(outputs)
        found = slopes_along(f, x, u, 0.0, 1.0, jitter)  # values next to 0 may be what is left of larger ones
        by = u.repeat(outputs)
        found = replace(
            found,
            step=found.step * by,
            **{name: getattr(found, name) / by for name in ("value", "error", "left", "right", "gap")},
        )
        best = found if best is None else best.better(found)
    assert best is not None
    return Slopes(*(getattr(best, name).reshape(outputs, -1) for name in Slopes.__dataclass_fields__))


def interval(x: Tensor, bad: Tensor, use: Tensor) -> str:
    """Such as "where 0.9 < input < 1.1", if the bad points are just those of an interval; "" if not."""
    for name, z in (("|input|", x.abs()), ("input", x)):
        low, high = float(z[bad].min()), float(z[bad].max())
        good = z[use & ~bad]
        if ((good >= low) & (good <= high)).any() or not good.numel():
            continue
        if name == "|input|" and not ((x[bad] > 0).any() and (x[bad] < 0).any()):
            continue
        below, above = good[good < low], good[good > high]
        left = f"{roundest(float(below.max()), low):g} < " if below.numel() else ""
        right = f" < {roundest(high, float(above.min())):g}" if above.numel() else ""
        if left and not right:
            return f"where {name} > {left.removesuffix(' < ')}"
        return f"where {left}{name}{right}"
    return ""


def roundest(a: float, b: float) -> float:
    """The number of the fewest digits in [a, b]."""
    if a <= 0 <= b:
        return 0.0
    size = math.floor(math.log10(max(abs(a), abs(b))))
    for digits in range(17):
        step = 10.0 ** (size - digits)
        nearest = math.ceil(a / step) * step
        if nearest <= b:
            return nearest
    return a
