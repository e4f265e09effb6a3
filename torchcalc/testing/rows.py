"""Special rows: one of NaN spreads to no other, zeros are a point like any other, and there may be no rows at all."""

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
from torchcalc.testing.numeric import chosen, flat, need_derivatives, of_input, replaced, slack, spread_out, tolerance
from torchcalc.testing.regions import handed
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, normal, said


def batched(subject: Subject, inputs: Sequence[Any]) -> tuple[int, tuple[int, ...]]:
    """(the number of rows, the inputs that have so many), of the first input that the caller gave."""
    own = handed(subject)
    x = inputs[own[0]]
    if not x.dim() or x.shape[0] < 2:
        raise Skip("fewer than two rows")
    n = x.shape[0]
    return n, tuple(i for i in own if inputs[i].dim() and inputs[i].shape[0] == n)


def rest(x: Tensor, k: int) -> Tensor:
    return torch.cat([x[:k], x[k + 1 :]])


def independent(
    subject: Subject, inputs: Sequence[Any]
) -> tuple[int, tuple[int, ...], list[int], tuple[Tensor, ...], Tensor]:
    """(rows, inputs and outputs that have so many, outputs, the first one's gradient), where no row depends on another."""
    need_derivatives(subject)
    if subject.random:
        raise Skip("random")
    n, rows = batched(subject, inputs)
    i = rows[0]
    outputs, (grad,) = subject.gradients(inputs, (i,))
    each = [k for k, y in enumerate(outputs) if y.dim() and y.shape[0] == n]
    if grad is None or not each:
        raise Skip("no output has a row for each of the input")
    for k in (0, n - 1):  # both, for a causal mask makes one of them independent
        moved = inputs[i].clone()
        moved[k] = normal(moved[k], 97)
        try:
            others, (other,) = subject.gradients(replaced(inputs, i, moved), (i,))
        except CLEAR:  # numbers that it does not take
            moved[k] = inputs[i][(k + 1) % n]
            others, (other,) = subject.gradients(replaced(inputs, i, moved), (i,))
        incoming = [v.clone() for v in subject.incoming(outputs)]
        for j in each:  # a row that is a copy of another one depends on that, and no input of its own tells
            incoming[j][k] *= -2
        _, (back,) = subject.gradients(inputs, (i,), incoming=incoming)
        pairs = [*((outputs[j], others[j]) for j in each), (grad, other), (grad, back)]
        if any(b is None or ((rest(a, k) - rest(b, k)).abs() > slack(subject, a)).any() for a, b in pairs):
            raise Skip("rows depend on each other")
    return n, rows, each, outputs, grad


@check("function", "rows of NaN")
def rows_of_nan(subject: Subject) -> Finding | None:
    """Where rows are independent of each other, NaN in one of them, or in its grad_output, stays there."""
    inputs = subject.floats()
    n, rows, each, outputs, grad = independent(subject, inputs)
    i = rows[0]
    other: Tensor | None
    for k, where in itertools.product((0, n - 1), ("the input", "grad_output")):
        poisoned = inputs[i].clone()
        incoming = [v.clone() for v in subject.incoming(outputs)]
        if where == "the input":
            poisoned[k] = torch.nan
        else:
            for j in each:
                incoming[j][k] = torch.nan
        try:
            others, (other,) = subject.gradients(replaced(inputs, i, poisoned), (i,), incoming=incoming)
        except CLEAR:
            continue
        named = [
            *((f"output {j}", outputs[j], others[j]) for j in each),
            (f"gradient of {subject.label(i)}", grad, other),
        ]
        for what, a, b in named:
            if b is None:
                continue
            found = compare(
                f"{what}, in the rows without NaN,", rest(b, k), rest(a, k), slack(subject, a),
                names=(f"NaN in row {k} of {where}", "without it"),
            )  # fmt: skip
            if found is not None:
                return replace(found, cause=f"NaN in one row of {where} spreads to others")
    return Finding("", figure=f"{n} rows")


@check("function", "numbers of rows")
def numbers_of_rows(subject: Subject) -> Finding | None:
    """Where rows are independent of each other, one row, or many times as many, get what they get in the example."""
    inputs = subject.floats()
    n, rows, each, outputs, grad = independent(subject, inputs)
    if len(each) < len(outputs):
        raise Skip("not every output has a row for each of the input")
    v = subject.incoming(outputs)
    with torch.no_grad():
        turned = subject.call(*(x.roll(1, 0) if k in rows else x for k, x in enumerate(inputs)))
    if any(((a - b.roll(1, 0)).abs() > slack(subject, b)).any() for a, b in zip(turned, outputs, strict=True)):
        raise Skip("a row's place matters")
    for count in (1, 2 * n + 1, 67):
        index = torch.arange(count, device=grad.device) % n
        many = [x.index_select(0, index) if k in rows else x for k, x in enumerate(inputs)]
        try:
            values, (got,) = subject.gradients(many, rows[:1], incoming=[w.index_select(0, index) for w in v])
        except CLEAR:
            continue
        cause, names = f"wrong for {count} row{'s' * (count > 1)}", (f"of {count} rows", "of the example's")
        expected = [
            *((f"output {k}", values[k], outputs[k]) for k in each),
            (f"gradient of {subject.label(rows[0])}", got, grad),
        ]
        for what, a, b in expected:
            found = compare(what, a, b.index_select(0, index), slack(subject, b), names=names)
            if found is not None:
                return replace(found, cause=cause + (f": {found.cause}" if found.cause else ""))
    return Finding("", figure=f"1 to {max(67, 2 * n + 1)} rows")


@check("function", "zeros")
def zeros(subject: Subject) -> Finding | None:
    """Where an input is zero, or one row of it, the gradient is finite and between the one-sided slopes."""
    need_derivatives(subject)
    inputs = subject.floats()
    points, note = 0, None
    for i in handed(subject)[:3]:
        x = inputs[i]
        if not x.numel():
            continue
        row = x.clone()
        if x.dim():
            row[0] = 0
        for where, at in (("zero", x * 0), ("zero in row 0", row)):
            if where != "zero" and (not x.dim() or x.shape[0] < 2):
                continue
            found = at_point(subject, replaced(inputs, i, at), i, f"where {subject.label(i)} is {where}")
            points += found is not None and found.verdict != "not checked"
            if found is not None and found.verdict == "error":
                return found
            note = found if found is not None and found.verdict == "note" else note
    if not points and note is None:
        raise Skip("not finite at zero, or without slopes there")
    return note or Finding("", figure=f"{points} points")


def at_point(subject: Subject, inputs: Sequence[Any], i: int, where: str) -> Finding | None:
    """The gradient of input i against both one-sided slopes."""
    x = inputs[i]
    try:
        leaves = subject.leaves(inputs, (i,))
        outputs = subject.call(*leaves)
        _, (grad,) = subject.gradients(inputs, (i,))
    except CLEAR:
        return None
    if not all(y.isfinite().all() for y in outputs):
        return None
    if grad is not None and bool(grad.isnan().any()) and custom(outputs):
        text = f"the gradient of {subject.label(i)} is NaN in {int(grad.isnan().sum())} elements {where}, the function finite"
        return Finding("", "error", "NaN", text, f"wrong {where}: not finite")
    indices = chosen(x)
    slopes = element_slopes(of_input(subject, inputs, i), x, flat(subject.incoming(outputs)).detach(), indices)
    value, allowed, use = spread_out(slopes, x, indices)
    grad = torch.zeros_like(x) if grad is None else grad
    # at a kink any mean of slopes is as good, also of those along other directions, as where equal elements are sorted
    across = slopes_along(of_input(subject, inputs, i), x, normal(x, 83))
    sharp = bool(slopes.kink.any() or across.kink.any())
    if (
        len(indices) == x.numel() and across.usable.all() and bool(use.all())
    ):  # or the slopes do not add up, as of a median
        weights = flat(subject.incoming(outputs)).detach()
        gap = (value * normal(x, 83)).sum() - weights @ across.value
        sharp = sharp or float(gap.abs()) > float(
            (allowed * normal(x, 83).abs()).sum() + weights.abs() @ tolerance(across)
        )
    sides = torch.cat([slopes.left.abs(), slopes.right.abs(), across.left.abs(), across.right.abs()])
    bound = 2 * x.numel() * float(sides.max()) if sharp else 0.0
    kink = torch.full_like(x, sharp and bound == bound, dtype=torch.bool)
    use = use & (not sharp)
    nearest = torch.where(kink, grad.nan_to_num(0, 0, 0).clamp(-bound, bound), value)
    margin = torch.where(kink, 1e-5 * (1 + bound), torch.maximum(allowed, 1e-5 * (1 + value.abs()))).nan_to_num(1.0)
    known = kink | (use & (allowed <= 1e-2 * (1 + value.abs())))
    if not known.any():
        return Finding("", "not checked", diagnosis="no slopes")
    found = compare(f"gradient of {subject.label(i)} {where}", grad, nearest, margin, use=known)
    if found is None:
        return Finding("")
    cause = "not finite" if not bool(grad[known].isfinite().all()) else found.cause
    soft = cause == "not finite" and not custom(outputs)
    return replace(
        found, verdict="note" if soft else found.verdict, cause=f"wrong {where}" + (f": {cause}" if cause else "")
    )


@check("function", "no rows")
def no_rows(subject: Subject) -> Finding | None:
    """A batch of no rows is served: outputs and gradients have no rows either, and a parameter's gradient is zero."""
    need_derivatives(subject)
    inputs = subject.floats()
    n, _ = batched(subject, inputs)
    cut = [k for k, x in enumerate(inputs[: subject.handed]) if isinstance(x, Tensor) and x.dim() and x.shape[0] == n]
    none = [x[:0] if k in cut else x for k, x in enumerate(inputs)]
    outputs = subject.call(*subject.leaves(inputs, subject.wrt))
    if not custom(outputs):
        raise Skip("all derivatives are torch's own, some of whose kernels divide by the number of rows")
    try:
        values = subject.call(*none)
    except Exception as error:  # with rows it worked
        return Finding("", "note", "raised", said(error), "refuses a batch of no rows")
    shapes = [(y.shape, z.shape) for y, z in zip(values, outputs, strict=False)]
    if len(values) != len(outputs) or any(a[1:] != b[1:] or (b and b[0] == n and a[0] != 0) for a, b in shapes):
        return Finding(
            "", "note", "shape", f"outputs of {[list(a) for a, _ in shapes]}", "wrong shape for a batch of no rows"
        )
    try:
        _, grads = subject.gradients(none)
    except Exception as error:  # forward worked
        verdict = "error" if custom(subject.call(*subject.leaves(none, subject.wrt))) else "note"
        return Finding("", verdict, "raised", f"backward: {said(error)}", "backward fails for a batch of no rows")  # type: ignore[arg-type]
    for k, g in zip(subject.wrt, grads, strict=True):
        if g is not None and g.shape != none[k].shape:
            text = f"gradient of {subject.label(k)}: {list(g.shape)}, where {list(none[k].shape)} is right"
            return Finding("", "error", "shape", text, "wrong gradient shape for a batch of no rows")
        if g is not None and k not in cut and all(y.numel() == 0 for y in values) and g.nan_to_num(1).any():
            text = f"gradient of {subject.label(k)} is {g.reshape(-1)[0].item():.3g}, where nothing is to be learnt"
            return Finding("", "error", "", text, "gradient from a batch of no rows")
    return None
