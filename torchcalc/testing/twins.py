"""A loss that has the name of one of torch.nn.functional, and no reference, is compared with that one.

It takes what the textbook's formulas of single elements do not cover: pairs and triplets of rows, labels of several classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchcalc.testing.numeric import slack
from torchcalc.testing.recognised import ENOUGH, named
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, is_float
from torchcalc.testing.textbook import FAMILIES

KNOWN = {word for family in FAMILIES for word in family.words}
TWINS: dict[str, Callable[..., Any]] = {
    word: getattr(F, name)
    for name in dir(F)
    if name.endswith("_loss") and (word := name.removesuffix("_loss").replace("_", "")) not in KNOWN
}
OTHERS: dict[str, Any] = {"margin": 0.4, "p": 1, "swap": True}


@check("loss", "twin")
def twin(subject: Subject) -> Finding:
    """A loss of the name of one of torch's has its values, with every reduction, at other inputs and with other options."""
    if subject.reference is not None:
        raise Skip("a reference is given")
    _, bare = named(subject)
    right = TWINS.get(bare)
    if right is None or subject.random or subject.nest is not None:
        raise Skip("no loss of torch has its name and takes other inputs than the textbook's")
    takes = inspect.signature(right).parameters
    mine = set(takes) - {"reduction", "weight", *subject.names}  # an input may have the name of an option: p
    shared = {n: subject.option(n) for n in mine if subject.has_option(n)}
    first: tuple[str, str] | None = None
    equal = total = 0
    for how, inputs, options in probes(subject):
        told = {**shared, **options}
        if not set(options) <= mine | {"reduction"}:
            continue
        varied = subject.with_option(**options) if options else subject
        try:
            y, t = values(varied, inputs), right(*inputs, **told)
        except (*CLEAR, AttributeError):
            continue
        alike = ((y - t).abs() <= slack(subject, t) + 1e-6 * t.abs()) if y.shape == t.shape else torch.zeros_like(t) > 0
        total, equal = total + alike.numel(), equal + int(alike.sum())
        if first is None and not bool(alike.all()):
            text = f"shape {list(y.shape)}, where {list(t.shape)} is right"
            if y.shape == t.shape:
                k = int((y - t).abs().argmax())
                text = f"it is {y.reshape(-1)[k].item():.8g}, where {t.reshape(-1)[k].item():.8g} is right"
            first = how, text
    if not total:
        raise Skip(f"torch's {right.__name__} refuses its inputs")
    if first is None:
        return Finding("", figure=f"is {right.__name__}")
    text = f"{first[0]} {first[1]}; {equal} of {total} values equal torch.nn.functional.{right.__name__}"
    verdict: Any = "error" if equal >= ENOUGH * total else "note"
    return Finding("", verdict, f"{total - equal} of {total} values", text, f"not torch's {right.__name__} {first[0]}")


def probes(subject: Subject) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    """(in words, inputs, options)."""
    reductions = [{"reduction": r} for r in ("none", "sum", "mean")] if subject.has_option("reduction") else [{}]
    others = [{name: value} for name, value in OTHERS.items() if subject.has_option(name)]
    for scale in (1.0, 0.1, 5.0):
        inputs = [x * scale if is_float(x) and i in subject.wrt else x for i, x in enumerate(subject.floats())]
        for options in (*reductions, *({**reductions[0], **other} for other in others)):
            spelled = ", ".join(f"{k}={v!r}" for k, v in options.items())
            where = f"at {scale:g} times the example" if scale != 1 else ""
            yield " ".join(part for part in (where, f"with {spelled}" if spelled else "") if part), inputs, options


def values(subject: Subject, inputs: Sequence[Any]) -> Tensor:
    with torch.no_grad():
        return subject.call(*inputs)[0]
