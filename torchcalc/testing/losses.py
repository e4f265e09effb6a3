"""Checks that only losses have: reductions, ignored targets, weights, smoothing, micro-batches, large logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.contract import agree
from torchcalc.testing.diagnosis import compare
from torchcalc.testing.numeric import first_order, quick, replaced, slack
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject
from torchcalc.testing.targets import classes, need, samples, value


def normalizers(subject: Subject, inputs: Sequence[Any], none: Tensor) -> dict[str, Tensor]:
    """What a mean may divide the sum by."""
    found = {
        "elements": none.new_tensor(float(none.numel())),
        "samples": none.new_tensor(float(samples(subject, inputs))),
    }
    weight, ignore = subject.option("weight"), subject.option("ignore_index")
    try:
        target = inputs[classes(subject, inputs)]
    except Skip:
        target = None
    if target is not None and ignore is not None:
        found["targets not ignored"] = (target != ignore).sum().to(none.dtype)
    tensors = [x for x in (weight, *inputs[2:]) if isinstance(x, Tensor) and x.is_floating_point()]
    for w in tensors:
        if target is not None and w.dim() == 1 and bool((target < len(w)).all()):
            counts = target != ignore if ignore is not None else torch.ones_like(target, dtype=torch.bool)
            found["weights of the targets"] = (w.to(none.dtype)[torch.where(counts, target, 0)] * counts).sum()
        if w.numel() and none.dim():
            found["sum of the weights"] = (
                w.to(none.dtype).expand_as(none).sum() if w.dim() <= none.dim() and fits(w, none) else w.sum()
            )
    return found


def fits(w: Tensor, y: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(w.shape, y.shape) == y.shape
    except RuntimeError:
        return False


@check("loss", "reductions")
def reductions(subject: Subject) -> Finding | None:
    """sum is the sum of none, mean is sum / N for an N that is named, values and gradients alike."""
    need(subject, "reduction")
    inputs = subject.floats()
    none, total, mean = (subject.with_option(reduction=r) for r in ("none", "sum", "mean"))
    each, (t,), (m,) = value(none, inputs), subject_values(total, inputs), subject_values(mean, inputs)
    found = compare("sum", t, each.sum(), slack(subject, each.sum(), each.abs().sum()), names=("sum", "sum of none"))
    if found is not None:
        return replace(found, cause="sum is not the sum of none")
    divided = {
        name: n
        for name, n in normalizers(subject, inputs, each).items()
        if abs(float(m * n - t)) <= slack(subject, t, m * n)
    }
    if not divided:
        ratio = float(t / m) if m else float("nan")
        text = f"mean is {float(m):.10g}, sum {float(t):.10g}: divided by {ratio:.6g}, for {each.numel()} elements"
        return Finding("", "error", f"sum / mean = {ratio:.6g}", text, "mean is divided by a wrong N")
    name, n = next(iter(divided.items()))
    if not subject.wrt:
        return Finding("", figure=f"N = {name}")
    ones = [torch.ones_like(each)]
    _, by_none = none.gradients(inputs, incoming=ones)
    _, by_sum = total.gradients(inputs, incoming=[torch.ones_like(t)])
    found = agree(subject, "of sum", by_sum, by_none, ("sum", "none"), "reductions disagree in gradient")
    if found is None and not any("weight" in subject.names[i] for i in subject.wrt):
        _, by_mean = mean.gradients(inputs, incoming=[torch.ones_like(m)])
        first = subject.wrt[:1]  # N may depend on weights, never on the first input
        expected = [None if g is None else g / n for g in by_sum[:1]]
        found = agree(
            replace(subject, wrt=first),
            "of mean",
            by_mean[:1],
            expected,
            ("mean", "sum / N"),
            "reductions disagree in gradient",
        )
    return found or Finding("", figure=f"N = {name}")


def subject_values(subject: Subject, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return subject.call(*inputs)[:1]


@check("loss", "upstream gradients")
def upstream(subject: Subject) -> Finding | None:
    """With reduction="none" and a gradient of its own for each sample, J'v against differences."""
    need(subject, "reduction")
    return first_order(subject.with_option(reduction="none"), subject.floats(), ' with reduction="none"')


@check("loss", "sum gradient")
def sum_gradient(subject: Subject) -> Finding | None:
    """With reduction="sum", J'v against differences."""
    need(subject, "reduction")
    return quick(subject.with_option(reduction="sum"), subject.floats(), ' with reduction="sum"')


@check("loss", "micro-batches")
def micro_batches(subject: Subject) -> Finding | None:
    """The loss and its gradient over a batch are those of its parts: their sum, or their mean by size."""
    need(subject, "reduction")
    inputs = subject.floats()
    n = samples(subject, inputs)
    first = inputs[subject.wrt[0]]
    if n < 3 or (first.dim() < 2 and isinstance(inputs[-1], Tensor) and inputs[-1].shape[:1] != (n,)):
        raise Skip("fewer than three samples")
    total = subject.with_option(reduction="sum")
    split = [
        i for i, x in enumerate(inputs)
        if isinstance(x, Tensor)
        and x.shape[:1] == (n,)
        and (i <= 1 or x.shape == first.shape or not x.is_floating_point())
    ]  # fmt: skip

    def part(a: int, b: int) -> list[Any]:
        return [x[a:b] if i in split else x for i, x in enumerate(inputs)]

    try:
        (y, *_), grads = total.gradients(inputs)
        parts = [total.gradients(part(*ends)) for ends in ((0, 2), (2, n))]
    except CLEAR as error:
        raise Skip(f"parts of the batch are refused: {error}") from error
    expected = sum((p[0][0] for p in parts), torch.zeros_like(y))
    found = compare("sum over the batch", y, expected, slack(subject, y), names=("batch", "sum of its parts"))
    if found is not None:
        return replace(found, verdict="note", cause="samples of a batch depend on each other")
    pieces = [p[1][0] for p in parts]
    if grads[0] is None or subject.wrt[0] not in split or any(g is None for g in pieces):
        return None
    whole = torch.cat([g for g in pieces if g is not None])
    found = compare(
        f"gradient of {subject.label(subject.wrt[0])}", grads[0], whole, slack(subject, whole), names=("batch", "parts")
    )
    return None if found is None else replace(found, cause="micro-batches differ from the full batch")


@check("loss", "large logits")
def large_logits(subject: Subject) -> Finding | None:
    """At inputs of ±1e4 loss and gradient are finite in float32, and near those of float64."""
    inputs = list(subject.floats(torch.float32))
    i = subject.wrt[0]
    inputs[i] = inputs[i].sign() * 1e4 + inputs[i]
    try:
        outputs, (grad, *_) = subject.gradients(inputs, (i,))
        exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        truths, (expected, *_) = subject.gradients(exact, (i,))
    except CLEAR as error:
        raise Skip(f"refuses large inputs: {str(error).partition(chr(10))[0]}") from error
    if not all(y.isfinite().all() for y in truths):
        moderate = subject.call(*replaced(subject.floats(), i, inputs[i].double() * 0.03))
        if all(y.isfinite().all() and y.abs().max() > 1e30 for y in moderate):
            raise Skip("grows exponentially")
        return Finding(
            "", "error", "not finite", "the loss is not finite in float64 at inputs of ±1e4", "unstable at large logits"
        )
    for what, got, right in (("loss", outputs[0], truths[0]), ("gradient", grad, expected)):
        if got is None or right is None:
            continue
        rounding = torch.finfo(torch.float32).eps * 1e4 * 16  # of the inputs' size, which exp makes a relative error
        size = float(right.abs().max())
        allowed = 1e-3 * size + rounding if what == "loss" else rounding * size + 1e-6
        found = compare(f"{what} at ±1e4 in float32", got.double(), right, allowed, names=("float32", "float64"))
        if found is not None:
            # squares of 1e4 that cancel lose digits, as those of a triplet loss: a weakness, where most digits stay
            few = bool((got.double() - right).abs().max() <= 0.01 * size)
            cause = f"unstable at large logits{': ' + found.cause if found.cause else ''}"
            return replace(found, verdict="note" if few else found.verdict, cause=cause)
    return None
