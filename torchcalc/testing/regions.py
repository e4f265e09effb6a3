"""Mistakes that live in a region of the inputs: a search over scales, along lines, and over a dense grid.

Where a function works on each element by itself, thousands of elements are compared in one go: a dense grid around 0 and
a geometric one over 22 orders of magnitude. Any other function is compared along a direction at inputs of many sizes,
and scanned along lines: between two points the function changes by the integral of its slope,

    g(b) − g(a) = h/2·(g'(a) + g'(b)) + O(h³),    g(t) = <v, f(x + t·d)>,                        (1)

where g' is what backward says. A wrong slope breaks (1) by h, more than smooth curvature does; the points where it is
broken most are compared with differences.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import COARSE, FINE, pattern
from torchcalc.testing.differences import NEAREST, Slopes, slopes_along
from torchcalc.testing.layouts import alike
from torchcalc.testing.numeric import along_all, first_order, flat, need_derivatives, replaced, slack, tolerance
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding, Verdict
from torchcalc.testing.storage import of_torch
from torchcalc.testing.subject import CLEAR, Subject, dot, is_float, normal

SCALES = (1e-8, 1e-5, 1e-3, 0.03, 0.25, 2.0, 5.0, -5.0, 20.0, 100.0, -1e3, 1e5)
POINTS, SUSPECTS = 100, 3  # of a line


@check("function", "gradient elsewhere")
def gradient_elsewhere(subject: Subject) -> Finding | None:
    """J'v against differences in other regions: on a dense grid, at other sizes of the inputs, and along lines."""
    need_derivatives(subject)
    inputs = subject.floats()
    dense = [i for i in subject.wrt if pointwise(subject, inputs, i)]
    found = None
    for i in dense[:3]:
        found = on_grid(subject, inputs, i)
        if found.verdict == "error":
            return found
    return found if dense else elsewhere(subject, inputs)


def elsewhere(subject: Subject, inputs: Sequence[Any]) -> Finding:
    """At other sizes of each input in turn and of the first two together, then along lines."""
    findings, sizes = [], 0
    for where, moved in (*scaled(subject, inputs), *suspects(subject, inputs)):
        try:
            finite = all(y.isfinite().all() for y in subject.call(*moved))
        except CLEAR:
            continue
        if not finite:
            continue
        found = glance(subject, moved, where)
        if found.verdict == "error":
            return found
        findings.append(found)
        sizes += 1
    if not findings:
        raise Skip("finite only near the example")
    told = sum(f.verdict != "not checked" for f in findings)
    if not told:
        return findings[0]
    return Finding("", figure=f"at {told} of {sizes} other inputs")


def glance(subject: Subject, inputs: Sequence[Any], where: str) -> Finding:
    """J'v against differences along one direction, for the outputs whose slope is exact; by element if they differ.

    Each output gets a v by which it counts as much as the others.
    """
    u = [normal(inputs[i], 11 + i) * inputs[i].abs().clamp(min=1e-3) for i in subject.wrt]
    slopes = along_all(subject, inputs, u)
    bars, size = tolerance(slopes), slopes.value.abs()
    exact = slopes.usable & (bars <= 1e-3 * size) & (size < 1e30) & (size > 1e-30)
    if not exact.any():
        return Finding("", "not checked", diagnosis=f"no difference is exact enough{where}")
    shapes = subject.call(*inputs)
    v = torch.where(exact, flat(subject.incoming(shapes)) / size, 0)
    incoming = [part.view_as(y) for part, y in zip(v.split([y.numel() for y in shapes]), shapes, strict=True)]
    _, grads = subject.gradients(inputs, incoming=incoming)
    actual, expected = dot(grads, u, u[0]), v @ slopes.value.nan_to_num(0)
    rounding = (
        1e4
        * torch.finfo(subject.exact).eps
        * sum(float((g * d).abs().sum()) for g, d in zip(grads, u, strict=True) if g is not None)
    )
    allowed = float((v.abs() * torch.where(exact, bars, 0)).sum()) + rounding
    if abs(float(actual - expected)) <= allowed:
        return Finding("")
    found = first_order(subject, inputs, where)
    verdict: Verdict = "note" if of_torch(subject.given) else "error"
    if found.verdict == "error":
        return replace(found, verdict=verdict)
    text = f"the slope along a direction{where}: analytic {float(actual):.10g}, numeric {float(expected):.10g}"
    return Finding("", verdict, f"{abs(float(actual - expected)):.1e} of {allowed:.1e} allowed", text)


def handed(subject: Subject) -> tuple[int, ...]:
    """The differentiable inputs that the caller gave; the others are a module's own parameters."""
    count = len(subject.inputs)
    if isinstance(subject.given, torch.nn.Module):
        count -= len(list(subject.given.parameters()))
    return tuple(i for i in subject.wrt if i < count) or subject.wrt[:1]


def scaled(subject: Subject, inputs: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    own = handed(subject)
    for scale in SCALES:
        yield f" at {scale:g} times the example", replaced(inputs, own[0], inputs[own[0]] * scale)
    for shift in (3.0, -10.0, 50.0, 300.0):
        yield f" at the example plus {shift:g}", replaced(inputs, own[0], inputs[own[0]] + shift)
    for i in own[1:3]:
        for scale in (1e-6, 0.01, -5.0, 100.0, 1e5):
            yield f" at {scale:g} times the example's {subject.label(i)}", replaced(inputs, i, inputs[i] * scale)
    for scale in (1e-3, 10.0) if len(own) > 1 else ():
        yield f" at {scale:g} times all inputs", [x * scale if i in own else x for i, x in enumerate(inputs)]


def suspects(subject: Subject, inputs: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """The points of two lines where (1) is broken most."""
    own = handed(subject)
    for k, end in enumerate((lambda x: -4 * x, lambda x: 2 * x.abs().mean() * normal(x, 90) * 1.5)):
        ways = {i: end(inputs[i]) - inputs[i] for i in own}
        for t in breaks(subject, inputs, ways):
            moved = [x + t * ways[i] if i in ways else x for i, x in enumerate(inputs)]
            yield f" at {t:.4g} of the way to {'-4 times the example' if k == 0 else 'another example'}", moved


def breaks(subject: Subject, inputs: Sequence[Any], ways: dict[int, Tensor]) -> list[float]:
    """Where along a line the slope of backward is least that of the function, by (1)."""
    ts = [(k + 0.37) / POINTS for k in range(POINTS)]
    values, slopes = [], []
    for t in ts:
        try:
            moved = [x + t * ways[i] if i in ways else x for i, x in enumerate(inputs)]
            outputs, grads = subject.gradients(moved, tuple(ways))
        except CLEAR:
            return []
        direction = list(ways.values())
        values.append(float(dot(outputs, subject.incoming(outputs), direction[0])))
        slopes.append(float(dot(grads, direction, direction[0])))
    g, d = torch.tensor(values, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)
    h = ts[1] - ts[0]
    gap = ((g[1:] - g[:-1]) - h / 2 * (d[1:] + d[:-1])).abs()
    gap = torch.where(gap.isfinite() & (gap > 1e3 * torch.finfo(g.dtype).eps * g[1:].abs()), gap, 0)
    both = gap[1:] + gap[:-1]  # a point between two broken intervals
    order = both.argsort(descending=True)[:SUSPECTS].tolist()
    return [ts[k + 1] for k in order if both[k] > 0]


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
        x = torch.linspace(-size, size, inputs[i].numel(), dtype=inputs[i].dtype, device=inputs[i].device)
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
            at[k] = turns * 0.3 if is_float(y) and k != i and subject.wrt and k in subject.wrt else turns
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
    where = interval(x, bad, use)
    inside = pattern(grad[bad], value[bad], allowed[bad]) if bool(grad[bad].isfinite().all()) else "not finite"
    cause = f"only {where}" + (f": {inside}" if inside else "") if where else inside
    return Finding("", "note" if of_torch(subject.given) else "error", figure, text, cause, details)


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


@check("loss", "unreduced elsewhere")
def unreduced_elsewhere(subject: Subject) -> Finding | None:
    """The same of the loss with reduction="none", which is elementwise more often."""
    if not subject.has_option("reduction"):
        raise Skip("no option reduction")
    return gradient_elsewhere(subject.with_option(reduction="none"))
