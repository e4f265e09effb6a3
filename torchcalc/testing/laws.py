"""Laws that hold for losses of any family: of positive weights, of classes and their order, of targets that are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.contract import agree
from torchcalc.testing.diagnosis import compare
from torchcalc.testing.numeric import quick, replaced, slack
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, is_float, normal, said
from torchcalc.testing.targets import classes, need, samples, value


def class_rows(subject: Subject) -> tuple[list[Any], int, int, int]:
    """(inputs, the index of the logits, of the targets, the number of classes), of a loss of rows of logits."""
    inputs = list(subject.floats())
    t = classes(subject, inputs)
    i = subject.wrt[0]
    x = inputs[i]
    if x.dim() != inputs[t].dim() + 1 or x.shape[:1] != inputs[t].shape[:1] or x.shape[1] < 2 or subject.random:
        raise Skip("no rows of logits with a class each")
    if int(inputs[t].max()) >= x.shape[1]:
        raise Skip("the targets are not the classes of the logits")
    one = [x[:1] if isinstance(x, Tensor) and x.shape[:1] == inputs[t].shape[:1] else x for x in inputs]
    try:
        first, second = (value(subject, replaced(one, t, torch.full_like(one[t], k))) for k in (0, 1))
    except CLEAR as error:
        raise Skip(f"one row is refused: {said(error)}") from error
    if torch.equal(first, second) or not (first.isfinite().all() and second.isfinite().all()):
        raise Skip("the loss of one row does not depend on its target")  # contrastive: labels of groups
    return inputs, i, t, x.shape[1]


@check("loss", "pos_weight")
def pos_weight(subject: Subject) -> Finding | None:
    """pos_weight multiplies the loss of positive targets, each class by its own, and leaves that of negatives alone."""
    need(subject, "pos_weight")
    inputs = list(subject.floats())
    if (
        len(inputs) < 2
        or not isinstance(inputs[1], Tensor)
        or inputs[1].shape != inputs[0].shape
        or not inputs[0].dim()
    ):
        raise Skip("no target of the input's shape")
    c = inputs[0].shape[-1]
    w = normal(inputs[0].new_ones(c), 73).abs() + torch.arange(c, dtype=inputs[0].dtype, device=inputs[0].device)
    each = subject.with_option(reduction="none") if subject.has_option("reduction") else subject

    def loss(target: Tensor, weight: Tensor) -> Tensor:
        return value(each.with_option(pos_weight=weight), replaced(inputs, 1, target))

    one, zero = torch.ones_like(inputs[1]), torch.zeros_like(inputs[1])
    try:
        plain = [loss(target, torch.ones_like(w)) for target in (one, zero)]
        heavy = [loss(target, w) for target in (one, zero)]
    except (*CLEAR, AttributeError) as error:
        raise Skip(f"no pos_weight for each class: {said(error)}") from error
    if plain[0].shape != inputs[0].shape:
        raise Skip("no loss of each element")
    names = ("with pos_weight", "expected")
    for what, got, right in (("positive", heavy[0], w * plain[0]), ("negative", heavy[1], plain[1])):
        found = compare(f"loss of {what} targets", got, right, slack(subject, right), names=names)
        if found is not None:
            cause = f"pos_weight of {what} targets"
            shifted = any(compare("", got, w.roll(k) * plain[0], slack(subject, right)) is None for k in range(1, c))
            if what == "positive" and shifted:
                return replace(found, cause="pos_weight of another class")
            if what == "negative" and compare("", got, w * plain[1], slack(subject, right)) is None:
                return replace(found, cause="pos_weight multiplies the loss of negative targets")
            return replace(found, cause=f"{cause} is wrong" + (f": {found.cause}" if found.cause else ""))
    mixed = (torch.arange(one.numel(), device=one.device) % 3 == 0).view(one.shape).to(one.dtype)
    right = torch.where(mixed == 1, heavy[0], heavy[1])
    found = compare("loss of mixed targets", loss(mixed, w), right, slack(subject, right), names=names)
    if found is not None:
        return replace(found, cause="pos_weight of another element's target")
    weighted = subject.with_option(pos_weight=w)
    found = quick(weighted, inputs, " with pos_weight")
    return found if found.verdict == "error" else None


@check("loss", "element weights")
def element_weights(subject: Subject) -> Finding | None:
    """weight of the input's shape multiplies the loss of each element by its own; a note, for it may be meant otherwise."""
    need(subject, "weight", "reduction")
    inputs = list(subject.floats())
    x = inputs[subject.wrt[0]]
    if (
        len(inputs) != 2
        or inputs[1].shape != x.shape
        or not is_float(inputs[1])
        or subject.option("weight") is not None
    ):
        raise Skip("no target of the input's shape, or weighted already")
    each = subject.with_option(reduction="none")
    w = normal(x, 77).abs()
    try:
        plain, weighted = value(each, inputs), value(each.with_option(weight=w), inputs)
    except (*CLEAR, AttributeError) as error:
        raise Skip(f"no weight for each element: {said(error)}") from error
    if plain.shape != x.shape:
        raise Skip("no loss of each element")
    names = ("with weights", "weight times loss")
    found = compare("loss of each element", weighted, w * plain, slack(subject, plain), names=names)
    if found is None:
        return None
    return replace(found, verdict="note", cause="weight does not multiply the loss of its own element")


@check("loss", "ignored rows")
def ignored_rows(subject: Subject) -> Finding | None:
    """What an ignored row holds changes neither the loss nor any gradient, with smoothing, weights and either reduction."""
    need(subject, "ignore_index")
    ignored = subject.option("ignore_index")
    if ignored is None:
        raise Skip("ignore_index is None")
    inputs, i, t, c = class_rows(subject)
    if inputs[t].shape[0] < 3:
        raise Skip("fewer than three samples")
    target = inputs[t].clone()
    target[target == ignored] = 0 if ignored != 0 else 1
    target[0] = ignored
    inputs[t] = target
    other = list(inputs)
    other[i] = inputs[i].clone()
    other[i][0] = other[i][0].flip(0) * 3 + 1
    variants: dict[str, dict[str, Any]] = {"": {}}
    if subject.has_option("reduction"):
        variants[" with reduction='sum'"] = dict(reduction="sum")
    if subject.has_option("label_smoothing"):
        variants[" with label_smoothing=0.3"] = dict(label_smoothing=0.3)
    if subject.has_option("weight") and subject.option("weight") is None:
        variants[" with weights"] = dict(weight=normal(inputs[i].new_ones(c), 71).abs())
    for where, options in variants.items():
        varied = subject.with_option(**options) if options else subject
        try:
            (y, *_), (g, *_) = varied.gradients(inputs, (i,))
            (z, *_), (h, *_) = varied.gradients(other, (i,))
            short = [x[1:] if k in (i, t) else x for k, x in enumerate(inputs)]
            (s, *_), (e, *_) = varied.gradients(short, (i,))
        except (*CLEAR, AttributeError):
            continue
        cause = f"ignored targets count{where}"
        pairs = [(y, z, "the ignored row's logits changed")]
        if not y.dim():
            pairs.append((y, s, "without the ignored row"))
        for a, b, other_name in pairs:
            found = compare(f"loss{where}", a, b, slack(varied, b), names=("loss", other_name))
            if found is not None:
                return replace(found, cause=cause)
        part = replace(varied, wrt=(i,))
        found = agree(part, f"when an ignored row changes{where}", [h], [g], ("changed", "before"), cause)
        if found is None and e is not None and not y.dim():
            full = torch.cat([torch.zeros_like(e[:1]), e])
            found = agree(part, f"with an ignored row{where}", [g], [full], ("with it", "without it"), cause)
        if found is not None:
            return replace(found, cause=cause)
    return Finding("", figure=f"{len(variants)} variants")


@check("loss", "classes")
def every_class(subject: Subject) -> Finding | None:
    """Every class is learnt; with the classes in another order, the loss is the same and the gradient in that order."""
    inputs, i, t, c = class_rows(subject)
    ignored, weight = subject.option("ignore_index"), subject.option("weight")
    silent = []
    for k in range(c):
        if k == ignored or (isinstance(weight, Tensor) and weight.numel() == c and float(weight.reshape(-1)[k]) == 0):
            continue
        moved = replaced(inputs, t, torch.full_like(inputs[t], k))
        moved[i] = moved[i].clone()
        moved[i].select(1, k).sub_(4)  # wrong by far, so that there is something to learn
        try:
            _, (grad,) = subject.gradients(moved, (i,))
        except CLEAR:
            return None
        if grad is None or not grad.any():
            silent.append(k)
    if silent and len(silent) < c:
        text = f"samples of class {', '.join(map(str, silent))} have no gradient, whatever their logits"
        return Finding("", "error", f"{len(silent)} of {c} classes", text, f"class {silent[0]} is never learnt")
    return permuted(subject, inputs, i, t, c)


def permuted(subject: Subject, inputs: Sequence[Any], i: int, t: int, c: int) -> Finding | None:
    """A note where the order matters, for that of an ordinal loss does."""
    order = torch.arange(c - 1, -1, -1, device=inputs[i].device)
    if subject.option("ignore_index") in range(c) or len(inputs) > 2 or isinstance(subject.option("weight"), Tensor):
        return None
    target = inputs[t]
    turned = torch.where((target >= 0) & (target < c), c - 1 - target, target)
    moved = replaced(replaced(inputs, i, inputs[i].index_select(1, order)), t, turned)
    (y, *_), (g, *_) = subject.gradients(inputs, (i,))
    try:
        (z, *_), (h, *_) = subject.gradients(moved, (i,))
    except CLEAR:
        return None
    part = replace(subject, wrt=(i,))
    cause = "the order of the classes matters"
    found = agree(part, "with the classes in reverse", [z], [y], ("reversed", "as they are"), cause, values=True)
    if found is None and g is not None and h is not None:
        found = agree(
            part, "with the classes in reverse", [h.index_select(1, order)], [g], ("reversed", "as they are"), cause
        )
    return None if found is None else replace(found, verdict="note", cause=cause)


@check("loss", "order of samples")
def order_of_samples(subject: Subject) -> Finding | None:
    """A mean or sum over samples does not depend on their order; a note, for that of a sequence may."""
    if subject.random:
        raise Skip("random")
    inputs = subject.floats()
    n = samples(subject, inputs)
    if n < 3:
        raise Skip("fewer than three samples")
    many = {i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.dim() and x.shape[0] == n}
    labels = {i for i in many if not is_float(inputs[i])}
    y = value(subject, inputs)
    if y.dim():
        raise Skip("no number for all samples together")
    found = None
    for moved in (many, {subject.wrt[0]} | labels, {subject.wrt[0], 1} & many):  # a weight may have as many rows
        try:
            z = value(subject, [x.roll(1, 0) if i in moved else x for i, x in enumerate(inputs)])
        except CLEAR:
            continue
        found = compare("loss", z, y, slack(subject, y), names=("with samples rotated", "as they are"))
        if found is None:
            return None
    return None if found is None else replace(found, verdict="note", cause="the order of the samples matters")


@check("loss", "targets out of range")
def out_of_range(subject: Subject) -> Finding | None:
    """A target below 0 or beyond the classes is refused or ignored, not taken as another class."""
    inputs, i, t, c = class_rows(subject)
    if inputs[i].device.type != "cpu":
        raise Skip("ends the process on other devices")
    note = None
    for wrong, taken in ((-1, (0, c - 1)), (c, (c - 1, 0))):
        if wrong == subject.option("ignore_index"):
            continue
        target = inputs[t].clone()
        target[0] = wrong
        try:
            (y, *_), (g, *_) = subject.gradients(replaced(inputs, t, target), (i,))
        except Exception:  # refused
            continue
        for k in taken:
            target = inputs[t].clone()
            target[0] = k
            (z, *_), (h, *_) = subject.gradients(replaced(inputs, t, target), (i,))
            alike = torch.equal(y, z) and (g is h or (g is not None and h is not None and torch.equal(g, h)))
            if not alike:
                continue
            text = (
                f"a target of {wrong} has the loss and the gradient of class {k}, of {c} classes: a slip goes unnoticed"
            )
            sign = "negative targets are" if wrong < 0 else "targets beyond the classes are"
            indexing = wrong == -1 and k == c - 1  # what Python's indexing does
            found = Finding("", "note" if indexing else "error", "", text, f"{sign} taken as class {k}")
            if not indexing:
                return found
            note = found
    return note
