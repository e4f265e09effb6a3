"""Checks of the targets of a loss: ignored ones, weights of their classes, smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import compare
from torchcalc.testing.numeric import quick, slack
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, normal


def need(subject: Subject, *options: str) -> None:
    for option in options:
        if not subject.has_option(option):
            raise Skip(f"no option {option}")


def value(subject: Subject, inputs: Sequence[Any]) -> Tensor:
    with torch.no_grad():
        return subject.call(*inputs)[0]


def classes(subject: Subject, inputs: Sequence[Any]) -> int:
    """The index of the class targets."""
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and not x.is_floating_point() and x.dtype != torch.bool and x.numel() and i:
            return i
    raise Skip("no class targets")


def samples(subject: Subject, inputs: Sequence[Any]) -> int:
    """The number of samples: the size of the first dimension of the inputs before any weights."""
    x = inputs[subject.wrt[0]]
    if not x.dim():
        raise Skip("0-d input")
    return x.shape[0]


@check("loss", "ignore_index")
def ignore_index(subject: Subject) -> Finding | None:
    """Ignored targets add nothing, count for nothing, and their rows of the gradient are zero."""
    need(subject, "ignore_index")
    ignored = subject.option("ignore_index")
    if ignored is None:
        raise Skip("ignore_index is None")
    inputs = list(subject.floats())
    t, n = classes(subject, inputs), samples(subject, inputs)
    if inputs[t].dim() < 1 or n < 3 or inputs[t].shape[0] != n:
        raise Skip("fewer than three samples")
    inputs[t] = inputs[t].clone()
    inputs[t][inputs[t] == ignored] = other_class(inputs, t, ignored)
    inputs[t][:2] = ignored
    kept = [
        x[2:] if isinstance(x, Tensor) and x.dim() and x.shape[0] == n and (i in (subject.wrt[0], t)) else x
        for i, x in enumerate(inputs)
    ]
    cause = "ignored targets count"
    (y, *_), grads = subject.gradients(inputs)
    (short, *_), fewer = subject.gradients(kept)
    if y.dim():
        found = compare(
            "loss of ignored samples", y[:2], torch.zeros_like(y[:2]), slack(subject, y), names=("loss", "0")
        )
        return replace(found, cause=cause) if found is not None else None
    found = compare("loss", y, short, slack(subject, short), names=("with ignored samples", "without them"))
    if found is not None:
        return replace(found, cause=cause)
    grad, expected = grads[0], fewer[0]
    if grad is None or expected is None:
        return None
    rows = {"rows equal to ignore_index": (inputs[t] == ignored).reshape(n, -1).all(1)}
    masks = {k: m.reshape(-1, *[1] * (grad.dim() - 1)).expand_as(grad) for k, m in rows.items()}
    full = torch.cat([torch.zeros_like(grad[:2]), expected])
    found = compare(
        "gradient", grad, full, slack(subject, full), regions=masks, names=("with ignored samples", "without them")
    )
    return found if found is None or found.cause else replace(found, cause=cause)


def other_class(inputs: Sequence[Any], t: int, ignored: int) -> int:
    return 0 if ignored != 0 else 1


@check("loss", "all ignored")
def all_ignored(subject: Subject) -> Finding | None:
    """If all targets are ignored, the gradient is zero; a NaN ends the training and is a note, for torch has it."""
    need(subject, "ignore_index")
    ignored = subject.option("ignore_index")
    if ignored is None:
        raise Skip("ignore_index is None")
    inputs = list(subject.floats())
    t = classes(subject, inputs)
    inputs[t] = torch.full_like(inputs[t], ignored)
    (y, *_), grads = subject.gradients(inputs)
    if y.isnan().any() or any(g is not None and g.isnan().any() for g in grads):
        return Finding(
            "",
            "note",
            "NaN",
            "the mean over no targets is NaN, and so is its gradient, or one of the two",
            "all ignored gives NaN",
        )
    for k, g in enumerate(grads[:1]):
        if g is not None and (bad := g.abs().max()) > 0:
            text = f"gradient of {subject.label(subject.wrt[k])} up to {float(bad):.3g}, where nothing is to be learnt"
            return Finding("", "error", f"{float(bad):.3g}", text, "ignored targets count")
    if y.any():
        return Finding("", "error", f"{float(y.abs().max()):.3g}", "the loss is not 0", "ignored targets count")
    return None


@check("loss", "class weights")
def class_weights(subject: Subject) -> Finding | None:
    """Equal weights change no mean; under none the loss is linear in the weights; a class of weight 0 adds nothing."""
    need(subject, "weight", "reduction")
    inputs = subject.floats()
    t = classes(subject, inputs)
    x = inputs[subject.wrt[0]]
    if x.dim() < 2 or isinstance(subject.option("weight"), Tensor):
        raise Skip("unbatched, or weighted already")
    c = x.shape[1]
    w = normal(x.new_ones(c), 71).abs()

    def loss(weight: Tensor | None, reduction: str) -> Tensor:
        return value(subject.with_option(weight=weight, reduction=reduction), inputs)

    try:
        plain, equal = loss(None, "mean"), loss(torch.full_like(w, 0.3), "mean")
        each, double = loss(w, "none"), loss(2 * w, "none")
    except (*CLEAR, TypeError) as error:
        raise Skip(f"no class weights: {error}") from error
    unlike = compare(
        "mean with equal weights", equal, plain, slack(subject, plain), names=("weights 0.3", "no weights")
    )
    if unlike is not None:
        unlike = replace(unlike, cause="mean is not over the weights", verdict="note")
    found = compare(
        "loss with doubled weights", double, 2 * each, slack(subject, each), names=("doubled", "twice the loss")
    )
    if found is not None:
        return replace(found, cause="not linear in the weights")
    zero = w.clone()
    hit = int(inputs[t].reshape(-1)[0])
    if 0 <= hit < c and not subject.option("label_smoothing", 0.0):
        zero[hit] = 0
        silent = loss(zero, "none")
        if silent.shape == inputs[t].shape:
            use = inputs[t] == hit
            found = compare(
                "loss of a class of weight 0",
                silent,
                torch.zeros_like(silent),
                slack(subject, each),
                use=use,
                names=("loss", "0"),
            )
            if found is not None:
                return replace(found, cause="weight of another class")
    weighted = subject.with_option(weight=w, reduction="mean")
    found = quick(weighted, inputs, " with class weights")
    return found if found.verdict == "error" else unlike


@check("loss", "label smoothing")
def label_smoothing(subject: Subject) -> Finding | None:
    """The loss is affine in the smoothing: L(ε) = (1 - ε)·L(0) + ε·L(1); its gradient is that of differences."""
    need(subject, "label_smoothing")
    inputs = subject.floats()
    none, half, full = (value(subject.with_option(label_smoothing=e), inputs) for e in (0.0, 0.3, 1.0))
    expected = 0.7 * none + 0.3 * full
    found = compare(
        "loss at smoothing 0.3", half, expected, slack(subject, expected, none), names=("loss", "0.7 L(0) + 0.3 L(1)")
    )
    if found is not None:
        return replace(found, cause="not affine in the smoothing")
    found = quick(subject.with_option(label_smoothing=0.3), inputs, " with label_smoothing=0.3")
    return found if found.verdict == "error" else None
