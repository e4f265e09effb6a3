"""The manners of torch.optim: closures, hooks, gradients left alone, parameters written in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchcalc.testing.optimizers.compare import difference, failed, parting, tree_difference
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import clone, gradients, set_gradients, snapshot
from torchcalc.testing.optimizers.variants import variants
from torchcalc.testing.registry import check
from torchcalc.testing.report import Finding


def error(check: str, figure: str, diagnosis: str, cause: str = "") -> Finding:
    return Finding(check, "error", figure, diagnosis, cause or figure)


@check("optimizer", "closure")
def closure(subject: OptimizerSubject) -> Finding:
    """step(closure) evaluates it with grad mode on, steps by its gradients, and returns its value."""
    params = subject.parameters()
    grads = gradients(params, 2)
    target = [g for g in grads[0] if g is not None]
    optimizer = subject.make(params)
    loss = torch.zeros(())
    evaluations: list[bool] = []

    def evaluate() -> Tensor:
        nonlocal loss
        evaluations.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        with torch.enable_grad():
            value = torch.stack([(p * t).sum() for p, t in zip(params, target, strict=True)]).sum()
            value.backward()
        if len(evaluations) == 1:
            loss = value.detach()
        return loss

    start = clone(params)
    set_gradients(params, grads[1])  # stale: the closure's count
    with torch.no_grad():
        returned = optimizer.step(evaluate)  # type: ignore[arg-type]
        if torch.is_grad_enabled():
            torch.set_grad_enabled(False)
            return error("closure", "grad mode left on", "step(closure) under no_grad leaves grad mode on")
    if not evaluations:
        return error("closure", "closure ignored", "step(closure) never calls the closure")
    if not all(evaluations):
        text = "the closure runs with grad mode off: backward fails in it"
        return error("closure", "closure not under enable_grad", text)
    if returned is None or difference(torch.as_tensor(returned).double(), loss.double()) > 0:
        text = f"step(closure) returns {returned}, not the closure's first {loss}"
        return error("closure", "loss not returned", text)
    if not subject.needs_closure and len(evaluations) == 1:
        found = [start, clone(params)]
        expected = subject.trial(start, grads[:1])
        m = parting(expected, found)
        if m is not None:
            causes = [("gradients read before the closure ran", lambda: subject.trial(start, grads[1:]))]
            return failed("closure", "step(closure) against the step with the closure's gradients", m, causes, found)
    subject.step(optimizer, params, grads[0])
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        return error("closure", "grad mode changed", "step() leaves grad mode off")
    times = len(evaluations)
    if times > 1 and not subject.needs_closure:
        text = f"the closure is evaluated {times} times in a step; a line search does that, others need it once"
        return Finding("closure", "note", f"{times} evaluations", text, "closure evaluated more than once")
    return Finding("closure", figure=f"{times} evaluation{'s' * (times > 1)} a step")


@check("optimizer", "failing closure")
def failing_closure(subject: OptimizerSubject) -> Finding | None:
    """An exception in the closure comes out, and nothing has changed."""
    params = subject.parameters()
    optimizer = subject.make(params)
    subject.step(optimizer, params, gradients(params, 1)[0])
    before = snapshot(optimizer)
    mode = torch.is_grad_enabled()

    class Failure(Exception):
        pass

    def fail() -> float:
        raise Failure

    try:
        optimizer.step(fail)
    except Failure:
        pass
    else:
        return error("failing closure", "exception swallowed", "step(closure) swallows the closure's exception")
    if torch.is_grad_enabled() != mode:
        torch.set_grad_enabled(mode)
        return error("failing closure", "grad mode changed", "after an exception in the closure grad mode is changed")
    text = tree_difference(before, snapshot(optimizer))
    return error("failing closure", "state changed", f"changed before the closure failed: {text}") if text else None


@check("optimizer", "hooks")
def hooks(subject: OptimizerSubject) -> Finding | None:
    """Hooks before and after the step run once each, in order, and may set the gradients."""
    params = subject.parameters()
    grads = gradients(params, 1)[0]
    optimizer = subject.make(params)
    seen: list[str] = []

    def record(name: str) -> Any:
        # An optimizer that wraps another one runs the global hooks of both.
        return lambda who, args, kwargs: seen.append(name) if who is optimizer else None

    handles = [
        register_optimizer_step_pre_hook(record("global pre")),
        register_optimizer_step_post_hook(record("global post")),
        optimizer.register_step_pre_hook(record("pre")),
        optimizer.register_step_post_hook(record("post")),
    ]
    try:
        subject.step(optimizer, params, grads)
    finally:
        for handle in handles:
            handle.remove()
    expected = ["global pre", "pre", "post", "global post"]
    if seen != expected:
        cause = "hooks do not run" if not seen else "hooks run twice" if len(seen) > 4 else "order of hooks"
        return error("hooks", cause, f"hooks run as {seen}, not as {expected}")
    subject.step(optimizer, params, grads)
    if seen != expected:
        return error("hooks", "removed hooks run", f"after handle.remove() hooks still run: {seen}")

    mine, other = subject.parameters(), subject.parameters()
    optimizer = subject.make(mine)
    optimizer.register_step_pre_hook(lambda *_: set_gradients(mine, grads) or None)  # type: ignore[func-returns-value]
    found = subject.play(optimizer, mine, [grads])
    m = parting(subject.play(subject.make(other), other, [grads]), found)
    return failed("hooks", "gradients set by a hook before the step", m) if m is not None else None


@check("optimizer", "gradients kept")
def gradients_kept(subject: OptimizerSubject) -> Finding:
    """The step does not write to p.grad, nor replace it."""
    tried = [(subject.exact, v) for v in variants(subject)] + [(dtype, {}) for dtype in subject.dtypes[1:]]
    for dtype, variant in tried:
        for name, way in subject.each_way():
            params = subject.parameters(dtype)
            optimizer = subject.make(params, **way, **variant)
            for t, step in enumerate(gradients(params, 3)):
                subject.step(optimizer, params, step)
                for i, (p, g) in enumerate(zip(params, step, strict=True)):
                    assert g is not None
                    off = difference(g, p.grad) if p.grad is not None else float("inf")
                    if off:
                        what = f"differs by {off:.2g} from what it was" if p.grad is not None else "is None"
                        how = f"{name}{f' with {variant}' if variant else ''}"
                        text = f"after step {t + 1}{how} the gradient of parameter {i} ({dtype}) {what}"
                        return error("gradients kept", "p.grad written", text)
    return Finding("gradients kept", figure=f"{len(tried)} configurations")


@check("optimizer", "in place")
def in_place(subject: OptimizerSubject) -> Finding | None:
    """The step writes the parameter's own memory, in a way that autograd notices."""
    params = subject.parameters()
    optimizer = subject.make(params)
    pointers = [p.data_ptr() for p in params]
    for grads in gradients(params, 3):  # as many as it takes until they move
        before, versions = clone(params), [p._version for p in params]
        subject.step(optimizer, params, grads)
        if not all(map(torch.equal, before, params)):
            break
    if [p.data_ptr() for p in params] != pointers:
        text = "after a step a parameter has other memory: views of it, tied weights and flat buffers are left behind"
        return error("in place", "parameter moved in memory", text)
    if any(not p.requires_grad or not p.is_leaf for p in params):
        return error("in place", "parameter no longer a leaf", "after a step a parameter is no leaf that requires grad")
    if any(p._version == v for p, v in zip(params, versions, strict=True)):
        text = (
            "the step bypasses autograd's version counter (p.data): a backward through values that a graph saved "
            "before the step then gives wrong gradients without a word"
        )
        return Finding("in place", "note", "version counter not bumped", text, "writes through p.data")
    return None


@check("optimizer", "zero_grad")
def zero_grad(subject: OptimizerSubject) -> Finding | None:
    """zero_grad sets gradients to None, or to zero in place if asked."""
    params = subject.parameters()
    optimizer = subject.make(params)
    set_gradients(params, gradients(params, 1)[0])
    kept = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    if any(p.grad is not g or g is None or bool(g.any()) for p, g in zip(params, kept, strict=True)):
        return error("zero_grad", "zero_grad(set_to_none=False)", "gradients are not zeroed in place")
    set_gradients(params, gradients(params, 1)[0])
    optimizer.zero_grad()
    if any(p.grad is not None and bool(p.grad.any()) for p in params):
        return error("zero_grad", "zero_grad()", "gradients are neither None nor zero after zero_grad()")
    if any(p.grad is not None for p in params):
        text = "zero_grad() keeps the gradients' memory, filled with zeros; torch's sets them to None"
        return Finding("zero_grad", "note", "kept", text, "gradients kept as zeros")
    return None


@check("optimizer", "named parameters")
def named_parameters(subject: OptimizerSubject) -> Finding | None:
    """Named parameters step as plain ones, and the names are kept in the groups."""
    params, plain = subject.parameters(), subject.parameters()
    try:
        optimizer = subject.make([(f"layer.{i}", p) for i, p in enumerate(params)])
    except (TypeError, ValueError, AttributeError) as reason:
        text = f"named parameters are refused: {type(reason).__name__}: {reason}"
        return Finding("named parameters", "note", "refused", text, "named parameters refused")
    names = optimizer.param_groups[0].get("param_names")
    if names != [f"layer.{i}" for i in range(len(params))]:
        text = f"the group's param_names are {names}"
        return Finding("named parameters", "note", "names lost", text, "names lost")
    grads = gradients(params, 2)
    m = parting(subject.play(subject.make(plain), plain, grads), subject.play(optimizer, params, grads))
    return failed("named parameters", "named against plain parameters", m) if m is not None else None


@check("optimizer", "construction")
def construction(subject: OptimizerSubject) -> Finding | None:
    """Refuses an empty list, one tensor, and the same parameter in two groups."""
    p, q = subject.parameters()[0], subject.parameters()[0]
    bad: dict[str, Any] = {
        "no parameters": [],
        "a tensor": p,
        "a parameter in two groups": [{"params": [p]}, {"params": [p, q]}],
    }
    for what, params in bad.items():
        try:
            subject.build(params, **subject.options)
        except (TypeError, ValueError):
            continue
        except Exception as reason:
            return Finding("construction", "note", what, f"{what}: raises {type(reason).__name__}: {reason}", what)
        found = error("construction", f"{what} accepted", f"the constructor takes {what} without a word")
        return (
            found if isinstance(subject.build, type) else replace(found, verdict="note")
        )  # a factory makes its own groups
    frozen = nn.Parameter(p.detach().clone(), requires_grad=False)
    optimizer = subject.make([p, frozen])
    before = frozen.detach().clone()
    subject.step(optimizer, [p, frozen], [torch.ones_like(p), None])
    if difference(before, frozen):
        return error("construction", "frozen parameter moved", "a parameter that requires no grad moved")
    return None
