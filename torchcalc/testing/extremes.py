"""Checks of the places where functions break: kinks and ties, huge inputs, NaN and infinity."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import compare
from torchcalc.testing.differences import element_slopes, slopes_along
from torchcalc.testing.graph import custom
from torchcalc.testing.layouts import elementwise
from torchcalc.testing.numeric import flat, need_derivatives, of_input, replaced, slack, tolerance
from torchcalc.testing.precision import short
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, is_float

POINTS = (0.0, 0.5, -0.5, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 6.0, -6.0)


@check("function", "kinks")
def kinks(subject: Subject) -> Finding | None:
    """At 0, ±1, ±6, ... the gradient is between the one-sided slopes; where inputs tie, their gradients add up."""
    need_derivatives(subject)
    inputs = subject.floats()
    return elementwise_kinks(subject, inputs) if elementwise(subject, inputs) else ties(subject, inputs)


def elementwise_kinks(subject: Subject, inputs: Sequence[Any]) -> Finding | None:
    i = subject.wrt[0]
    x = inputs[i].new_tensor(POINTS)
    wide = [y.reshape(-1)[:1].expand_as(x).clone() if isinstance(y, Tensor) else y for y in inputs]
    wide[i] = x
    try:
        outputs, (grad,) = subject.gradients(wide, (i,))
    except CLEAR as error:
        raise Skip(f"refuses {POINTS}") from error
    slopes = element_slopes(of_input(subject, wide, i), x, flat(subject.incoming(outputs)))
    grad = torch.zeros_like(x) if grad is None else grad
    inside = torch.stack([y.isfinite() for y in outputs]).all(0)
    low, high = torch.minimum(slopes.left, slopes.right), torch.maximum(slopes.left, slopes.right)
    margin = 1e-5 * (1 + high.abs() + low.abs())
    nearest = torch.minimum(torch.maximum(grad.nan_to_num(0), low - margin), high + margin)
    kink = slopes.kink & low.isfinite() & high.isfinite() & inside
    settled = slopes.usable & inside & (slopes.error <= 1e-5 * (1 + slopes.value.abs()))
    what = f"gradient of {subject.label(i)}"
    found = compare(f"{what} at a kink", grad, nearest, margin, use=kink, names=("analytic", "nearest slope"))
    found = found or compare(f"{what} at special points", grad, slopes.value, tolerance(slopes), use=settled)
    if found is not None:
        at = x[found.details["index"][0]].item()
        return replace(found, cause=f"wrong at input {at:g}" + (f": {found.cause}" if found.cause else ""))
    one = torch.stack(subject.incoming(outputs)).sum(0)
    names = [
        f"{x[k]:g} ({slopes.left[k] / one[k]:.3g} | {slopes.right[k] / one[k]:.3g})"
        for k in kink.nonzero().reshape(-1).tolist()
    ]
    return Finding("", figure=f"kinks at {', '.join(names[:4])}" if names else "no kinks seen")


def ties(subject: Subject, inputs: Sequence[Any]) -> Finding | None:
    """All elements of an input equal and moved together: the sum of the gradient is the slope, and it is finite."""
    for i, c in itertools.product(subject.wrt[:2], (0.0, 1.0)):
        x = torch.full_like(inputs[i], c)
        try:
            outputs, (grad,) = subject.gradients(replaced(inputs, i, x), (i,))
            slopes = slopes_along(of_input(subject, inputs, i), x, torch.ones_like(x))
        except CLEAR:
            continue
        settled = slopes.usable & (slopes.error <= 1e-5 * (1 + slopes.value.abs()))
        if grad is None or not settled.all() or not x.numel():
            continue
        if not grad.isfinite().all() and not custom(subject.call(*subject.leaves(replaced(inputs, i, x), (i,)))):
            text = f"gradient of {subject.label(i)} is not finite where all its elements are {c:g}, but the function is"
            return Finding("", "note", "not finite", text, f"not finite where inputs are {c:g}")
        weights = flat(subject.incoming(outputs))
        allowed = float(weights.abs() @ tolerance(slopes)) + slack(subject, grad)
        where = f"sum of the gradient of {subject.label(i)}, all of whose elements are {c:g},"
        found = compare(where, grad.sum(), weights @ slopes.value, allowed)
        if found is not None:
            return replace(found, cause="wrong where inputs tie" + (f": {found.cause}" if found.cause else ""))
    return None


@check("function", "extremes")
def extremes(subject: Subject) -> Finding | None:
    """The first input times 2, 4, ... 16384, in float64 and float32: what grows slowly stays finite."""
    need_derivatives(subject)
    base = subject.floats()
    i = subject.wrt[0]
    history: dict[torch.dtype, list[Tensor]] = {subject.exact: [], torch.float32: []}
    for k in range(15):
        for dtype, seen in history.items():
            inputs = [x.to(dtype) if is_float(x) else x for x in replaced(base, i, base[i] * 2.0**k)]
            try:
                outputs, (grad,) = subject.gradients(inputs, (i,))
            except CLEAR as error:
                raise Skip(f"refuses larger inputs: {str(error).partition(chr(10))[0]}") from error
            grad = torch.zeros_like(inputs[i]) if grad is None else grad
            seen.append(torch.cat([flat(outputs), grad.reshape(-1)]).double())
            sizes, count = inputs[i], len(flat(outputs))
        for dtype, other in ((subject.exact, torch.float32), (torch.float32, subject.exact)):
            # beyond the domain, as of erfinv, both leave the numbers at the same input; a burst has its place by dtype
            here = history[other][-1].isfinite() if dtype != other else None
            found = burst(subject, history[dtype], sizes, count, short(dtype), here)
            if found is not None:
                return found
    return extremes_reference(subject, base, i)


def burst(
    subject: Subject, seen: Sequence[Tensor], x: Tensor, outputs: int, dtype: str, here: Tensor | None
) -> Finding | None:
    """A number that was growing slowly, and is infinite or NaN now."""
    if len(seen) < 4 or not x.numel() or float(x.abs().max()) < 32:
        return None
    now, a, b, c = seen[-1], seen[-2].abs(), seen[-3].abs(), seen[-4].abs()
    slow = (a <= 16 * b + 1) & (b <= 16 * c + 1) & (a < 1e30)
    bad = ~now.isfinite() & slow & a.isfinite() & b.isfinite() & c.isfinite()
    bad = (bad if here is None else bad & here).nonzero().reshape(-1)
    if not len(bad):
        return None
    k = int(bad[0])
    what = (
        f"output element {k}" if k < outputs else f"gradient of {subject.label(subject.wrt[0])}, element {k - outputs},"
    )
    size = float(x.abs().max())
    text = f"{what} is {float(now[k])} in {dtype} at |input| up to {size:.4g}; at half of it {float(seen[-2][k]):.6g}"
    return Finding(
        "",
        "error",
        f"{float(now[k])}",
        text,
        f"unstable at large input: {'value' if k < outputs else 'gradient'} {float(now[k])}",
    )


def extremes_reference(subject: Subject, base: Sequence[Any], i: int) -> Finding | None:
    if subject.reference is None:
        return None
    for scale in (30.0, 1e4, -1e4):
        inputs = replaced(base, i, base[i] * scale)
        outputs, grads = subject.gradients(inputs)
        truths, expected = subject.gradients(inputs, fn=subject.reference)
        for what, got, right in (("output", outputs, truths), ("gradient", grads, expected)):
            for g, e in zip(got, right, strict=True):
                if g is None or e is None:
                    continue
                use = (
                    e.isfinite()
                    if what == "output"
                    else torch.full_like(e, all(t.isfinite().all() for t in truths), dtype=torch.bool) & e.isfinite()
                )
                found = compare(
                    f"{what} at {scale:g} times the example",
                    g,
                    e,
                    slack(subject, e, base[i] * scale),
                    use=use,
                    names=("function", "reference"),
                )
                if found is not None:
                    return replace(
                        found, cause=f"wrong at large input: {found.cause}" if found.cause else "wrong at large input"
                    )
    return None


@check("function", "special values")
def special_values(subject: Subject) -> Finding | None:
    """NaN and infinity come through as in the reference; without one, a NaN must not get lost."""
    need_derivatives(subject)
    base, i = subject.floats(), subject.wrt[0]
    if not base[i].numel():
        raise Skip("empty example")
    for special in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e300, 1e-300):
        x = base[i].clone()
        if abs(special) < float("inf") and abs(special) > torch.finfo(x.dtype).max:
            continue
        x.view(-1)[0] = special
        inputs = replaced(base, i, x)
        try:
            outputs, (grad,) = subject.gradients(inputs, (i,))
        except CLEAR:
            continue
        if subject.reference is not None:
            truths, (expected,) = subject.gradients(inputs, (i,), fn=subject.reference)
            pairs = [
                *zip(outputs, truths, strict=True),
                *([(grad, expected)] if grad is not None and expected is not None else []),
            ]
            for got, right in pairs:
                finite = right.nan_to_num(0, 0, 0)
                found = compare(
                    f"at input {special}", got, right, slack(subject, finite), names=("function", "reference")
                )
                if found is not None:
                    return replace(found, cause=f"wrong at input {special}")
        elif special != special and not any(y.isnan().any() for y in outputs):
            text = f"with NaN in {subject.label(i)} the output has none: it hides what has gone wrong before"
            return Finding("", "note", "", text, "NaN swallowed")
    return None
