"""Recorded rules compute what the rules compute, and refuse what they cannot tell."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import torchcalc.optim as ours
from torchcalc.formula.expression import Expression, walk
from torchcalc.formula.rule import Recording, record

OPERATIONS = {
    "neg": lambda a: -a, "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "pow": lambda a, b: a**b, "fma": lambda a, b, c: a * b + c, "rounded": lambda a: a,
    "sqrt": math.sqrt, "abs": abs, "lt": lambda a, b: a < b, "gt": lambda a, b: a > b,
    "where": lambda c, a, b: a if c else b, "maximum": max, "minimum": min, "sgn": lambda a: (a > 0) - (a < 0),
}  # fmt: skip


def evaluate(recording: Recording, values: dict[str, float]) -> dict[str, float]:
    """In float64, by hand."""
    known: dict[Expression, Any] = {}
    for e in walk(recording.outputs.values()):
        if e.op in ("input", "parameter"):
            known[e] = values[e.args[0]]
        else:
            known[e] = e.args[0] if e.op == "constant" else OPERATIONS[e.op](*(known[a] for a in e.args))
    return {name: known[e] for name, e in recording.outputs.items()}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (ours.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
        (ours.Adam, dict(weight_decay=0.1, amsgrad=True)),
        (ours.AdamW, dict(betas=(0.3, 0.8))),
        (ours.RMSprop, dict(momentum=0.9, centered=True, weight_decay=0.1)),
        (ours.Adagrad, dict(lr_decay=0.1)),
        (ours.NAdam, dict(weight_decay=0.1, decoupled_weight_decay=True)),
        (ours.Lion, dict(weight_decay=0.1)),
    ],
)
def test_a_recording_is_the_rule(cls: type[ours.Optimizer], options: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = cls([p], **options)
    (group,) = optimizer.param_groups
    slots = tuple(optimizer.slots(group))
    state = {key: torch.tensor(3.0 if key == "step" else 0.5) for key in optimizer.scalars}
    arguments = {**optimizer.hyper(group), **optimizer.advance(state, group, optimizer.hyper(group), False)}
    recording = record(cls.rule, slots, arguments)
    start = {name: 0.3 + 0.2 * i for i, name in enumerate(recording.inputs)} | {"v": 5.0}
    start = {name: start[name] for name in recording.inputs}

    tensors = {name: torch.tensor([x], dtype=torch.float64) for name, x in start.items()}
    cls.rule(**tensors, **arguments)
    found = evaluate(recording, {**start, **{name: arguments[name] for name in recording.parameters}})
    for name, x in found.items():
        assert x == pytest.approx(tensors[name].item(), rel=1e-12), name


def test_ways_through_a_rule_are_told_apart() -> None:
    def hash_of(**options: Any) -> str:
        optimizer = ours.RMSprop([torch.nn.Parameter(torch.zeros(1))], **options)
        (group,) = optimizer.param_groups
        return record(ours.RMSprop.rule, tuple(optimizer.slots(group)), {**optimizer.hyper(group), "t": 1}).hash

    assert hash_of() == hash_of(lr=0.5, eps=0)
    assert len({hash_of(), hash_of(weight_decay=0.1), hash_of(momentum=0.9), hash_of(centered=True)}) == 4


def test_a_branch_on_an_unknown_number_is_refused() -> None:
    def rule(p: Any, g: Any, *, t: float, lr: float) -> None:
        p.add_(g, alpha=-lr if t < 10 else 0.0)

    with pytest.raises(TypeError, match=r"whether \(t < 10.0\) is true"):
        record(rule, (), {"t": 1, "lr": 0.1})


def test_a_rule_that_writes_to_the_gradient_is_refused() -> None:
    def rule(p: Any, g: Any, *, lr: float) -> None:
        p.sub_(g.mul_(lr))

    with pytest.raises(TypeError, match=r"the rule rule writes to g"):
        record(rule, (), {"lr": 0.1})
