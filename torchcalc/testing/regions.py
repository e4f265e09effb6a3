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
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import compare
from torchcalc.testing.graph import custom
from torchcalc.testing.grid import blame, grid, on_grid, pointwise, reach
from torchcalc.testing.numeric import along_all, first_order, flat, need_derivatives, replaced, slack, tolerance
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, dot, normal, said

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
    for where, moved, far in (*scaled(subject, inputs), *suspects(subject, inputs)):
        try:
            finite = all(y.isfinite().all() for y in subject.call(*moved))
        except CLEAR:
            continue
        if not finite:
            continue
        found = glance(subject, moved, where, far)
        if found.verdict == "error":
            return found
        findings.append(found)
        sizes += 1
    if not findings:
        raise Skip("finite only near the example")
    for found in findings:
        if found.verdict == "note":
            return found
    told = sum(f.verdict != "not checked" for f in findings)
    if not told:
        return findings[0]
    return Finding("", figure=f"at {told} of {sizes} other inputs")


def glance(subject: Subject, inputs: Sequence[Any], where: str, far: bool = False) -> Finding:
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
    verdict = blame(subject, inputs, subject.wrt, incoming, grads)
    if far and not custom(subject.call(*subject.leaves(inputs, subject.wrt))):
        verdict = (
            "note"  # at such sizes derivatives of torch itself are wrong, as that of cosine_similarity below its eps
        )
    if found.verdict == "error":
        return replace(found, verdict=verdict)
    text = f"the slope along a direction{where}: analytic {float(actual):.10g}, numeric {float(expected):.10g}"
    return Finding("", verdict, f"{abs(float(actual - expected)):.1e} of {allowed:.1e} allowed", text)


def handed(subject: Subject) -> tuple[int, ...]:
    """The differentiable inputs that the caller gave; the others are a module's own parameters."""
    return tuple(i for i in subject.wrt if i < subject.handed) or subject.wrt[:1]


def scaled(subject: Subject, inputs: Sequence[Any]) -> Iterator[tuple[str, list[Any], bool]]:
    """(where, the inputs there, whether their size is an extreme one)."""
    own = handed(subject)
    for scale in SCALES:
        yield f" at {scale:g} times the example", replaced(inputs, own[0], inputs[own[0]] * scale), extreme(scale)
    for shift in (3.0, -10.0, 50.0, 300.0):
        yield f" at the example plus {shift:g}", replaced(inputs, own[0], inputs[own[0]] + shift), False
    for i in own[1:3]:
        for scale in (1e-6, 0.01, -5.0, 100.0, 1e5):
            at = replaced(inputs, i, inputs[i] * scale)
            yield f" at {scale:g} times the example's {subject.label(i)}", at, extreme(scale)
    for scale in (1e-3, 10.0) if len(own) > 1 else ():
        yield f" at {scale:g} times all inputs", [x * scale if i in own else x for i, x in enumerate(inputs)], False


def extreme(scale: float) -> bool:
    return not 1e-4 < abs(scale) < 1e4


def suspects(subject: Subject, inputs: Sequence[Any]) -> Iterator[tuple[str, list[Any], bool]]:
    """The points of two lines where (1) is broken most."""
    own = handed(subject)
    for k, end in enumerate((lambda x: -4 * x, lambda x: 2 * x.abs().mean() * normal(x, 90) * 1.5)):
        ways = {i: end(inputs[i]) - inputs[i] for i in own}
        for t in breaks(subject, inputs, ways):
            moved = [x + t * ways[i] if i in ways else x for i, x in enumerate(inputs)]
            yield f" at {t:.4g} of the way to {'-4 times the example' if k == 0 else 'another example'}", moved, False


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


@check("function", "reference elsewhere")
def reference_elsewhere(subject: Subject) -> Finding | None:
    """Values and gradients equal those of the reference on a dense grid, at other sizes, and at zeros."""
    if subject.reference is None:
        raise Skip("no reference given")
    if subject.random:
        raise Skip("random")
    inputs = subject.floats()
    seen = 0
    for where, moved in (*sizes(subject, inputs), *grids(subject, inputs)):
        try:
            truths, expected = subject.gradients(moved, fn=subject.reference)
        except CLEAR:
            continue  # the reference refuses that
        try:
            outputs, grads = subject.gradients(moved)
        except Exception as error:  # the reference took it
            return Finding("", "error", "raised", f"{said(error)}{where}", f"raises{where}")
        seen += 1
        named = [(f"output {k}", y, t) for k, (y, t) in enumerate(zip(outputs, truths, strict=True))]
        if all(t.isfinite().all() for t in truths):
            pairs = zip(subject.wrt, grads, expected, strict=True)
            named += [(f"gradient of {subject.label(i)}", g, e) for i, g, e in pairs if g is not None and e is not None]
        for what, y, t in named:
            if y.shape != t.shape:
                continue  # "reference" tells
            size = t.nan_to_num(0, 0, 0).abs()
            rounding = 1e-12 if "grid" in where else slack(subject, t, *(moved[i] for i in subject.wrt))
            allowed = 1e-6 * (size if "grid" in where else size.max() if size.numel() else size) + rounding
            found = compare(f"{what}{where}", y, t, allowed, use=t.isfinite(), names=("function", "reference"))
            if found is not None:
                return replace(found, cause=f"not the reference{where}" + (f": {found.cause}" if found.cause else ""))
    return Finding("", figure=f"at {seen} other inputs")


def sizes(subject: Subject, inputs: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Other sizes of each input that was handed in, and zeros; what the example's range may be the whole domain of is kept."""
    for k, i in enumerate(handed(subject)[:3]):
        x, of = inputs[i], f"{subject.label(i)}"
        low, high = domain(x)
        for scale in (1e-8, 1e-4, 0.03, 0.5, *((-1.0, 5.0, 100.0, 1e4) if k == 0 else ())):
            if x.numel() and not (low <= float(x.min()) * scale <= high and low <= float(x.max()) * scale <= high):
                continue
            yield f" where {of} is {scale:g} times the example", replaced(inputs, i, x * scale)
        if k and low == 0:
            continue  # the end of the domain of a target, where slopes have one side
        yield f" where {of} is zero", replaced(inputs, i, x * 0)
        if x.dim() and x.shape[0] > 1:
            yield f" where {of} is zero in row 0", replaced(inputs, i, torch.cat([x[:1] * 0, x[1:]]))


def domain(x: Tensor) -> tuple[float, float]:
    """[0, 1] or what is not negative, where the example lies in it."""
    if not x.numel() or float(x.min()) < 0:
        return -math.inf, math.inf
    return 0.0, 1.0 if float(x.max()) <= 1 else math.inf


def grids(subject: Subject, inputs: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """A dense grid in each input of which the function is pointwise."""
    for i in handed(subject)[:3]:
        if not pointwise(subject, inputs, i):
            continue
        x = grid(inputs[i])
        low, high = domain(inputs[i])
        x = x[(x.abs() <= min(1e5, reach(subject, inputs, i))) & (x >= low) & (x <= high)]
        turns = torch.arange(len(x), device="cpu") * 7
        alike = [k for k, y in enumerate(inputs) if isinstance(y, Tensor) and y.shape == inputs[i].shape]
        moved = [y.reshape(-1)[turns % y.numel()] if k in alike else y for k, y in enumerate(inputs)]
        yield f" on a grid of {subject.label(i)}", replaced(moved, i, x)


@check("loss", "unreduced elsewhere")
def unreduced_elsewhere(subject: Subject) -> Finding | None:
    """The same of the loss with reduction="none", which is elementwise more often."""
    if not subject.has_option("reduction"):
        raise Skip("no option reduction")
    return gradient_elsewhere(subject.with_option(reduction="none"))
