"""Parameter groups, and parameters without a gradient, with a late one, or with one that is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchcalc.testing.optimizers.compare import Mismatch, failed, parting, same, tree_difference
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, Play, gradients, snapshot
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

#: An option and the value that a group has of its own, as a function of the default.
OWN = {
    "lr": lambda x: 3 * float(x),
    "weight_decay": lambda x: float(x) + 0.3,
    "momentum": lambda x: 0.5 if float(x) != 0.5 else 0.7,
    "betas": lambda x: (0.5, *(0.7 for _ in x[1:])),
    "alpha": lambda x: 0.5,
    "rho": lambda x: 0.5,
    "eps": lambda x: 0.1,
    "maximize": lambda x: not x,
    "lr_decay": lambda x: 0.3,
}


def independent(subject: OptimizerSubject, way: dict[str, Any]) -> bool:
    """Whether the step of a parameter is the same with others beside it."""
    params = subject.parameters()
    grads = gradients(params, 3)
    together = subject.trial(params, grads, **way)
    return all(parting(alone(subject, way, params, grads, i), column(together, i)) is None for i in range(len(params)))


def alone(subject: OptimizerSubject, way: dict[str, Any], params: list[nn.Parameter], grads: Grads, i: int) -> Play:
    """One parameter with an optimizer of its own, which sees only the steps that have a gradient for it."""
    steps: Grads = [[step[i]] for step in grads if step[i] is not None]
    seen = iter(subject.trial([params[i]], steps, **way))
    row, rows = next(seen), []
    rows.append(row)
    for step in grads:
        row = next(seen) if step[i] is not None else row
        rows.append(row)
    return rows


def column(play: Play, i: int) -> Play:
    return [[row[i]] for row in play]


@check("optimizer", "independence")
def independence(subject: OptimizerSubject) -> Finding:
    """A parameter steps as it would alone."""
    params = subject.parameters()
    grads = gradients(params, 4)
    for name, way in subject.each_way():
        together = subject.trial(params, grads, **way)
        for i in range(len(params)):
            m = parting(alone(subject, way, params, grads, i), column(together, i))
            if m is not None:
                return Finding(
                    "independence",
                    "note",
                    "parameters are coupled",
                    f"parameter {i}{name} steps otherwise with the others beside it (a global norm, a line search, or "
                    f"a mistake; what follows from independence is not checked): {m}",
                    "parameters are coupled",
                )
    return Finding("independence", figure=f"{len(params)} parameters")


@check("optimizer", "not finite")
def not_finite(subject: OptimizerSubject) -> Finding | None:
    """A gradient of inf or nan in one element does not reach other elements or parameters."""
    params = subject.parameters()
    for name, way in subject.each_way():
        if not independent(subject, way):
            raise Skip("its parameters are coupled")
        for bad in (torch.inf, torch.nan):
            clean = gradients(params, 2)
            dirty = gradients(params, 2)
            g = dirty[0][0]
            assert g is not None
            g.view(-1)[0] = bad
            expected, found = subject.trial(params, clean, **way), subject.trial(params, dirty, **way)
            if all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True)):
                return Finding("not finite", figure="the whole step is left out")
            for a, b in zip(expected, found, strict=True):
                b[0].view(-1)[0] = a[0].view(-1)[0]
            m = parting(expected, found)
            if m is not None:
                if m.parameter == 0:  # normalised over the whole parameter: Muon, LAMB
                    return Finding("not finite", "note", f"{bad} spreads", f"{bad} in a gradient{name}: {m}")
                return failed("not finite", f"{bad} in the gradient of parameter 0{name}", m)
    return None


@check("optimizer", "groups")
def groups(subject: OptimizerSubject) -> Finding:
    """A group's own options count, as the constructor's do."""
    params = subject.parameters()[:2]
    if len(params) < 2:
        params += subject.parameters(seed=5)[:1]
    grads = gradients(params, 4)
    tested = []
    for name, way in subject.each_way():
        for option, value in OWN.items():
            if option not in subject.defaults:
                continue
            default = subject.defaults[option]
            try:
                own = value(default)
                expected = _side_by_side(subject, params, grads, way, {option: own})
            except (TypeError, ValueError, RuntimeError):
                continue  # a default of None, or a value that does not go with the other options
            mine = [nn.Parameter(p.detach().clone()) for p in params]
            try:
                optimizer = subject.make([{"params": mine[:1]}, {"params": mine[1:], option: own}], **way)
            except ValueError as error:
                raise Skip(f"it takes one group only: {error}") from error
            try:
                found = subject.play(optimizer, mine, grads)
            except ValueError:
                continue  # groups that do not go together: a line search in two directions
            m = parting(expected, found)
            if m is not None:
                what = f"a group with {option}={own}{name} against an optimizer with {option}={own}"
                if independent(subject, way):
                    causes = [
                        (f"group options ignored: {option}", subject.trial(params, grads, **way)),
                        (f"one group's {option} used for all", subject.trial(params, grads, **{**way, option: own})),
                    ]
                    return failed("groups", what, m, causes, found)
                return Finding("groups", "note", option, f"{what}, with coupled parameters: {m}")
            tested.append(option)
    if not tested:
        raise Skip("its groups have no option that is known here")
    return Finding("groups", figure=", ".join(dict.fromkeys(tested)))


def _side_by_side(
    subject: OptimizerSubject, params: list[nn.Parameter], grads: Grads, way: dict[str, Any], own: dict[str, Any]
) -> Play:
    """The first parameter with the options given, the second with its own ones, in two optimizers."""
    if not all(k in subject.accepts or k in subject.defaults for k in own):
        raise ValueError("not an option")
    first = subject.trial(params[:1], [s[:1] for s in grads], **way)
    second = subject.trial(params[1:], [s[1:] for s in grads], **way, **own)
    return [a + b for a, b in zip(first, second, strict=True)]


@check("optimizer", "add_param_group")
def add_param_group(subject: OptimizerSubject) -> Finding | None:
    """A group added later starts as in a new optimizer, and leaves the others alone."""
    params = subject.parameters()[:2]
    grads = gradients(params, 5)
    if any(not same(v, subject.example.defaults.get(k, v)) for k, v in subject.defaults.items()):
        raise Skip("its groups have other options than its defaults, which a new group gets")
    for name, way in subject.each_way():
        if len(params) < 2 or not independent(subject, way):
            raise Skip("its parameters are coupled")
        mine = [nn.Parameter(p.detach().clone()) for p in params]
        optimizer = subject.make(mine[:1], **way)
        found = [[*row, params[1].detach()] for row in subject.play(optimizer, mine[:1], [s[:1] for s in grads[:2]])]
        try:
            optimizer.add_param_group({"params": mine[1:]})
        except ValueError as error:
            raise Skip(f"it takes one group only: {error}") from error
        found += subject.play(optimizer, mine, grads[2:])[1:]
        late: Grads = [[s[0], s[1] if t >= 2 else None] for t, s in enumerate(grads)]
        expected = [
            [a[0], b[0]]
            for a, b in zip(alone(subject, way, params, late, 0), alone(subject, way, params, late, 1), strict=True)
        ]
        m = parting(expected, found)
        if m is not None:
            finding = failed("add_param_group", f"a group added after 2 steps{name}", m)
            cause = finding.cause or _late_cause(subject) or "a late group does not start anew"
            return Finding("add_param_group", "error", finding.figure, finding.diagnosis, cause, finding.details)
    return None


@check("optimizer", "missing gradients")
def missing_gradients(subject: OptimizerSubject) -> Finding:
    """A parameter whose gradient is None keeps its value and its state; its first gradient may come late."""
    params = subject.parameters()
    grads = gradients(params, 8)
    grads = [[None if _absent(t, i) else g for i, g in enumerate(step)] for t, step in enumerate(grads)]
    for name, way in subject.each_way():
        try:
            found = subject.trial(params, grads, **way)
        except Exception as reason:
            text = f"a gradient missing now and then, or a first one late{name}: {type(reason).__name__}: {reason}"
            return Finding("missing gradients", "error", "raised", text, "a missing or late gradient raises")
        moved = _moved_without(found, grads)
        zeros: Grads = [
            [torch.zeros_like(p) if g is None else g for p, g in zip(params, step, strict=True)] for step in grads
        ]
        as_zero = subject.trial(params, zeros, **way)
        causes = [("gradients of None treated as zero", as_zero)]
        coupled = not independent(subject, way)
        if moved is not None and coupled:
            return Finding("missing gradients", "note", "moved", f"with coupled parameters{name}: {moved}")
        if moved is not None:
            return failed("missing gradients", f"a parameter whose gradient is None moved{name}", moved, causes, found)
        if coupled:
            continue
        columns = [alone(subject, way, params, grads, i) for i in range(len(params))]
        expected = [[c[t][0] for c in columns] for t in range(len(found))]
        m = parting(expected, found)
        if m is not None:
            finding = failed(
                "missing gradients", f"steps without a gradient count for a parameter{name}", m, causes, found
            )
            cause = finding.cause if finding.cause and "constant" not in finding.cause else ""
            counted = _late_cause(subject)
            cause = cause or counted or "step or state advanced while there was no gradient"
            by_design = cause == counted and subject.reference is None  # schedule-free optimizers count so, and apex's
            return Finding(
                "missing gradients",
                "note" if by_design else "error",
                finding.figure,
                finding.diagnosis,
                cause,
                finding.details,
            )
    scope = "" if independent(subject, {}) else "; coupled, so only that they stay"
    return Finding("missing gradients", figure=f"None now and then, and first gradients at steps 1, 4{scope}")


def _late_cause(subject: OptimizerSubject) -> str:
    """What is counted for all parameters together, in a group or in the optimizer."""
    params = subject.parameters()
    optimizer = subject.make(params)
    subject.step(optimizer, params, gradients(params, 1)[0])
    counted = [k for k, v in optimizer.param_groups[0].items() if k not in subject.defaults and k != "params"]
    changed = [k for k, v in subject.defaults.items() if not same(optimizer.param_groups[0][k], v)]
    keys: list[Any] = list(optimizer.state)
    kept = [k for k in keys if isinstance(k, str)]
    names = ", ".join(dict.fromkeys([*counted, *changed, *kept]))
    return f"counted for all parameters together: {names}" if names else ""


def _absent(t: int, i: int) -> bool:
    return (t + i) % 4 == 2 or (i == 1 and t < 3)


def _moved_without(play: Play, grads: Grads) -> Mismatch | None:
    """A parameter that moved in a step that had no gradient for it."""
    for t, step in enumerate(grads):
        for i, g in enumerate(step):
            if g is None:
                m = parting([[play[t][i]], [play[t][i]]], [[play[t][i]], [play[t + 1][i]]])
                if m is not None:
                    return Mismatch(**{**m.__dict__, "step": t + 1, "parameter": i})
    return None


@check("optimizer", "no gradients")
def nothing_to_do(subject: OptimizerSubject) -> Finding | None:
    """A step without any gradient changes nothing, before the first step and later."""
    params = subject.parameters()
    optimizer = subject.make(params)
    for when in ("first", "later"):
        before = snapshot(optimizer)
        subject.step(optimizer, params, [None] * len(params))
        text = tree_difference(before[0], snapshot(optimizer)[0])
        if text:
            return Finding(
                "no gradients", "error", "parameters moved", f"a {when} step without any gradient: {text}", "moved"
            )
        subject.step(optimizer, params, gradients(params, 1)[0])
    return None
