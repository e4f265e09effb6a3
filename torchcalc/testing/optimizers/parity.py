"""It is the rule that it says: the same run as a twin, or as a textbook rule in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from torchcalc.testing.optimizers.compare import failed, parting, same_run
from torchcalc.testing.optimizers.reference import Runner, hyperparameters, reference_run
from torchcalc.testing.optimizers.subject import OptimizerSubject, spelled
from torchcalc.testing.optimizers.tensors import Grads, Play, gradients
from torchcalc.testing.optimizers.textbook import explanations
from torchcalc.testing.optimizers.variants import variants
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding


@check("optimizer", "parity")
def parity(subject: OptimizerSubject) -> Finding:
    """The same run as the reference, over its options; the slip that explains a difference is named."""
    if subject.reference is None:
        return resemblance(subject)
    params = subject.parameters()
    grads = gradients(params, 6)
    for row in grads[1:]:  # of all sizes, so that ε has a place
        for g in row:
            assert g is not None
            g.mul_(10.0 ** torch.linspace(-4, 1, g.numel(), dtype=g.dtype).reshape(g.shape))
    expect = reference_run(subject, params, subject.reference)
    runs, refused = 0, []
    for variant in variants(subject):
        try:
            expected = expect(grads, **variant)
        except (TypeError, ValueError, RuntimeError):
            refused.append(variant)
            continue
        for name, way in subject.each_way():
            found = subject.trial(params, grads, **way, **variant)
            m = parting(expected, found)
            if m is not None:
                what = f"{spelled(subject.reference)}{f' with {variant}' if variant else ''} against this{name}"
                return failed("parity", what, m, list(causes(subject, params, grads, variant, expect, expected)), found)
            runs += 1
    if not runs:
        raise Skip(f"the reference refuses {refused}")
    return Finding("parity", figure=f"{runs} runs equal {spelled(subject.reference)}")


def resemblance(subject: OptimizerSubject) -> Finding:
    """A note, if it is a known rule but for a classic slip: that may be meant, and is worth a look.

    Raises:
        Skip: it is not.
    """
    if subject.needs_closure or subject.is_noisy:
        raise Skip("no reference given")
    params = subject.parameters()
    grads = gradients(params, 6)
    steps = [[g for g in row if g is not None] for row in grads]
    for variant in ({}, {"weight_decay": 0.1}, {"momentum": 0.9}):
        if not all(k in subject.defaults for k in variant):
            continue
        try:
            found = subject.trial(params, grads, **variant)
        except (TypeError, ValueError, RuntimeError):
            continue
        hyper = {**hyperparameters(subject.defaults), **variant}
        rules = [*explanations([p.detach() for p in params], steps, hyper)]
        right = [family for family, slip, run in rules if not slip and same_run(run, found)]
        if right:
            continue
        for family, slip, run in rules:
            if slip and same_run(run, found):
                how = f" with {variant}" if variant else ""
                text = f"no reference given; its first six steps{how} are those of {family}, but for this: {slip}"
                return Finding("parity", "note", family, text, slip)
    raise Skip("no reference given")


def causes(
    subject: OptimizerSubject,
    params: list[nn.Parameter],
    grads: Grads,
    variant: dict[str, Any],
    expect: Runner,
    expected: Play,
) -> Iterator[tuple[str, Callable[[], Play] | Play]]:
    """Suspects: the reference with an option ignored or changed, and the textbook with a slip."""
    hyper = {**subject.defaults, **variant}

    def with_options(**options: Any) -> Play:
        try:
            return expect(grads, **{**variant, **options})
        except Exception:
            return [[torch.full_like(p, torch.nan) for p in params] for _ in expected]

    def ignoring(option: str, value: Any) -> Callable[[], Play]:
        return lambda: with_options(**{option: value})

    off = {"weight_decay": 0.0, "nesterov": False, "amsgrad": False, "dampening": 0.0, "centered": False}
    for option, value in off.items():
        if hyper.get(option):
            yield f"{option.replace('_', ' ')} ignored", ignoring(option, value)
    if hyper.get("momentum"):
        yield "momentum ignored", lambda: with_options(momentum=0.0, nesterov=False, dampening=0.0)
    if "maximize" in hyper:
        sign = "maximize ignored" if hyper["maximize"] else "sign of the update"
        yield sign, lambda: with_options(maximize=not hyper["maximize"])
    for option in variant:
        if option in subject.defaults:
            yield f"{option} ignored", ignoring(option, subject.defaults[option])
    steps = [[g for g in row if g is not None] for row in grads]
    known = None
    for family, slip, run in explanations([p.detach() for p in params], steps, hyper):
        if not slip:
            known = family if same_run(run, expected) else None
        elif known == family and not same_run(run, expected):
            yield slip, run
