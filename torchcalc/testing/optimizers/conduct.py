"""What a step leaves alone, and what it may not rely on: generators, flags, p.grad's memory, frozen parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchcalc.testing.optimizers.compare import failed, leaves, parting
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, clone, gradients
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.settings import alike, generators, restore, seed, settings


@check("optimizer", "side effects")
def side_effects(subject: OptimizerSubject) -> Finding | None:
    """Making it and stepping change no global flag, seed no generator, and draw from none without need."""
    consumed: list[str] = []
    ends = []
    for value in (1, 2):
        seed(value)
        flags, before = settings(), generators()
        params = subject.parameters()
        optimizer = subject.make(params)
        subject.play(optimizer, params, gradients(params, 3))
        changed = restore(flags)
        if changed:
            text = f"after three steps {', '.join(changed)} are not as before: other code of the process sees it"
            return Finding("side effects", "error", changed[0], text, f"changes {changed[0]}")
        after = generators()
        consumed = [name for name in before if not alike(before[name], after[name])]
        ends.append((after, clone(params)))
        grown = [i for i, p in enumerate(params) if p._backward_hooks or not p.requires_grad]
        if grown:
            text = f"parameters {grown} have hooks, or require no grad any more"
            return Finding("side effects", "error", "hooks", text, "leaves hooks on parameters")
    seeded = [name for name in consumed if alike(ends[0][0][name], ends[1][0][name])]
    if seeded:
        text = f"whatever {seeded[0]} generator was seeded with, after three steps it is in the same state"
        return Finding("side effects", "error", "seeded", text, f"seeds {seeded[0]} generator")
    if consumed and not subject.is_noisy and not subject.is_random:
        same = all(map(torch.equal, ends[0][1], ends[1][1]))
        text = f"it draws from {', '.join(consumed)} generator" + (
            ", and its steps do not depend on what it draws" if same else ""
        )
        return Finding("side effects", "note", "draws", text, f"draws from {consumed[0]} generator")
    if consumed and subject.is_noisy:
        text = "two runs with the same gradients end elsewhere; all else is checked with the noise at its mean"
        return Finding("side effects", "note", "noise", text, "its steps have noise")
    return Finding("side effects", figure=f"draws from {', '.join(consumed)}" if consumed else "")


@check("optimizer", "gradient memory")
def gradient_memory(subject: OptimizerSubject) -> Finding | None:
    """Gradients written into the same memory, and overwritten after the step, step as fresh ones."""
    if subject.needs_closure:
        raise Skip("its gradients come from a closure")
    params = subject.parameters()
    grads = gradients(params, 5)
    for name, way in subject.each_way():
        expected = subject.trial(params, grads, **way)
        mine = [nn.Parameter(p.detach().clone()) for p in params]
        optimizer = subject.make(mine, **way)
        for p in mine:
            p.grad = torch.zeros_like(p)
        found = [clone(mine)]
        for row in grads:
            for p, g in zip(mine, row, strict=True):
                assert p.grad is not None and g is not None
                p.grad.copy_(g)
            optimizer.step()
            for p in mine:
                if p.grad is not None:
                    p.grad.fill_(1e3)
                else:
                    p.grad = torch.zeros_like(p)
            found.append(clone(mine))
        m = parting(expected, found)
        if m is not None:
            finding = failed("gradient memory", f"gradients in memory that is used again{name}", m)
            cause = "p.grad kept as state: it changes with the next gradient"
            return Finding("gradient memory", "error", finding.figure, finding.diagnosis, cause, finding.details)
    shared = _shared(subject)
    if shared:
        text = f"{shared} is the parameter's own memory, not a copy: it changes with every step"
        return Finding("gradient memory", "note", "shared", text, "state shares the parameter's memory")
    return None


def _shared(subject: OptimizerSubject) -> str:
    """The path of a state tensor that lies in a parameter's memory; empty if none."""
    params = subject.parameters()
    optimizer = subject.make(params)
    subject.play(optimizer, params, gradients(params, 2))
    for i, p in enumerate(params):
        for path, x in leaves(optimizer.state.get(p, {})).items():
            if (
                isinstance(x, torch.Tensor)
                and x.numel()
                and x.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
            ):
                return f"state[{i}]{path}"
    return ""


@check("optimizer", "unfreezing")
def unfreezing(subject: OptimizerSubject) -> Finding | None:
    """A parameter that required no grad when the optimizer was made steps once it does, as a new one."""
    params = subject.parameters()
    if len(params) < 2:
        params = [*params, *subject.parameters(seed=3)]
    grads = gradients(params, 6)
    rows: Grads = [[g if i or t >= 3 else None for i, g in enumerate(row)] for t, row in enumerate(grads)]
    for name, way in subject.each_way():
        expected = subject.trial(params, rows, **way)  # it had no gradient: another check sees to that
        mine = [nn.Parameter(p.detach().clone(), requires_grad=i > 0) for i, p in enumerate(params)]
        optimizer: Any = subject.make(mine, **way)
        found = subject.play(optimizer, mine, rows[:3])
        mine[0].requires_grad_()
        found += subject.play(optimizer, mine, rows[3:])[1:]
        m = parting(expected, found)
        if m is not None:
            still = torch.equal(found[0][0], found[-1][0])
            cause = (
                "a parameter frozen at first never moves" if still else "a parameter frozen at first steps otherwise"
            )
            finding = failed("unfreezing", f"parameter 0, frozen in steps 1 to 3{name}", m)
            return Finding("unfreezing", "error", finding.figure, finding.diagnosis, cause, finding.details)
    return None
