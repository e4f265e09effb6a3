"""What a function does beside its result: to generators, global settings, containers, buffers, other gradients and hooks.

A function that reseeds a generator makes the noise of the whole training repeat; one that appends to a list at each call
ends the training for want of memory; one that returns its own buffer as a gradient has it overwritten by the optimizer.
None of this shows in a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.numeric import need_derivatives
from torchcalc.testing.reach import CONTAINERS, walk
from torchcalc.testing.registry import check
from torchcalc.testing.report import Finding
from torchcalc.testing.settings import alike, generators, left_alone, restore, seed, settings
from torchcalc.testing.subject import CLEAR, Subject, pull, reseed

CALLS = 3  # a container that grows by each of them


def once(subject: Subject, create_graph: bool = False) -> list[Tensor | None]:
    """One call forward and backward, without the seed that a random subject gets."""
    leaves = subject.leaves(subject.floats(), subject.wrt)
    try:
        outputs = plain(subject).call(*leaves)
        return list(pull(outputs, [leaves[i] for i in subject.wrt], subject.incoming(outputs), create_graph))
    except CLEAR:
        return []


def plain(subject: Subject) -> Subject:
    return replace(subject, random=False)


@check("function", "side effects")
def side_effects(subject: Subject) -> Finding | None:
    """A call leaves generators, global settings, containers, other gradients and hooks as they are."""
    need_derivatives(subject)
    with left_alone():
        for look in (of_modes, of_settings, of_generators, of_gradients, of_containers, of_buffers):
            found = look(subject)
            if found is not None:
                return found
    return None


def reachable(subject: Subject) -> list[tuple[str, Any]]:
    """Named tensors and containers that a function may keep."""
    reached = walk(subject.given, subject.fn)
    return [(name or "a default", x) for name, x in reached if isinstance(x, (Tensor, *CONTAINERS))]


def error(text: str, cause: str, verdict: Any = "error") -> Finding:
    return Finding("", verdict, "", text, cause)


def of_modes(subject: Subject) -> Finding | None:
    """A call leaves train and eval mode as they are."""
    if not isinstance(subject.given, nn.Module):
        return None
    parts = list(subject.given.modules())
    before = [m.training for m in parts]
    try:
        for mode in (True, False):
            for m in parts:
                m.training = mode
            once(subject)
            if any(m.training != mode for m in parts):
                return error(
                    f"a call took a part of the module out of {'train' if mode else 'eval'} mode", "changes train mode"
                )
    finally:
        for m, mode in zip(parts, before, strict=True):
            m.training = mode
    return None


def of_settings(subject: Subject) -> Finding | None:
    before = settings()
    names = list(subject.disturbed)
    once(subject)
    names += restore(before)
    if names:
        return error(f"a call changed {', '.join(dict.fromkeys(names))} for the whole process", f"changes {names[0]}")
    return None


def of_generators(subject: Subject) -> Finding | None:
    states = []
    for value in (1, 2):
        seed(value)
        start = generators()
        once(subject)
        states.append((start, generators()))
    for name, start in states[0][0].items():
        (end, other) = (after[name] for _, after in states)
        if alike(start, end) and alike(states[1][0][name], other):
            continue
        if alike(end, other):
            text = f"after a call {name} generator is in the same state, whatever it was before"
            return error(text, f"reseeds {name} generator")
        if not subject.random or name != "torch's":
            text = f"a call draws from {name} generator" + (
                "" if subject.random else ", though its result is not random"
            )
            return error(text, f"consumes {name} generator", "note" if subject.random else "error")
    return None


def of_gradients(subject: Subject) -> Finding | None:
    """A call writes no .grad, leaves no hook, and changes what requires grad only of its results."""
    tensors = [(name, x) for name, x in reachable(subject) if isinstance(x, Tensor)]
    marks = [
        (x, x.grad, mark(x)) for _, x in tensors if x.is_leaf and x.is_floating_point() and x.layout == torch.strided
    ]
    try:
        for x, _, zero in marks:
            x.grad = zero
        found = of_hooks(subject, tensors)
        if found is not None:
            return found
        for x, _, zero in marks:
            if x.grad is not zero or zero.any():
                name = next(name for name, y in tensors if y is x)
                return error(f"a call wrote the .grad of {name}, which only backward() may", "writes .grad")
    finally:
        for x, grad, _ in marks:
            x.grad = grad
    return None


def mark(x: Tensor) -> Tensor:
    """A .grad that shows whether anybody writes to it."""
    return torch.zeros_like(x, requires_grad=False)


def of_hooks(subject: Subject, tensors: Sequence[tuple[str, Tensor]]) -> Finding | None:
    before = [(hooks(x), x.requires_grad) for _, x in tensors]
    modules = [m for m in [subject.given] if isinstance(m, nn.Module)]
    counts = [module_hooks(m) for m in modules]
    leaves = subject.leaves(subject.floats(), subject.wrt)
    plainly = subject.floats()
    try:
        plain(subject).call(*plainly)
    except CLEAR:
        return None
    for i, x in enumerate(plainly):
        if isinstance(x, Tensor) and x.requires_grad:
            return error(f"{subject.label(i)} requires grad after a call, and did not before", "changes requires_grad")
    kept = [hooks(x) for x in leaves if isinstance(x, Tensor)]
    try:
        outputs = plain(subject).call(*leaves)
        pull(outputs, [leaves[i] for i in subject.wrt], subject.incoming(outputs))
    except CLEAR:
        return None
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and x.is_leaf and x.grad is not None:
            return error(f"a call wrote the .grad of {subject.label(i)}, which only backward() may", "writes .grad")
        if isinstance(x, Tensor) and x.is_floating_point() and x.is_leaf and x.requires_grad and i not in subject.wrt:
            return error(f"{subject.label(i)} requires grad after a call, and did not before", "changes requires_grad")
    if [hooks(x) for x in leaves if isinstance(x, Tensor)] != kept:
        return error("a call left a hook on its input, which runs in every backward through it", "leaves hooks")
    for (name, x), (hooked, required) in zip(tensors, before, strict=True):
        if hooks(x) != hooked:
            return error(f"a call left a hook on {name}", "leaves hooks")
        if x.is_leaf and x.requires_grad != required:
            return error(f"a call changed whether {name} requires grad", "changes requires_grad")
    if [module_hooks(m) for m in modules] != counts:
        return error("a call left a hook on the module or a part of it", "leaves hooks")
    return None


def hooks(x: Tensor) -> int:
    if not x.is_leaf and x.grad_fn is None:
        return 0
    post = getattr(x, "_post_accumulate_grad_hooks", None) if x.is_leaf else None
    return len(x._backward_hooks or ()) + len(post or ())


def module_hooks(module: nn.Module) -> int:
    return sum(
        len(value)
        for m in module.modules()
        for name, value in vars(m).items()
        if name.endswith("_hooks") and isinstance(value, dict)
    )


def of_containers(subject: Subject) -> Finding | None:
    """The second to fourth call of the same inputs make no container longer each time."""
    once(subject), once(subject)  # what is cached by shape is there now

    def sizes() -> dict[int, tuple[str, int]]:
        return {
            id(x): (name, x.numel() if isinstance(x, Tensor) else len(x))
            for name, x in reachable(subject)
            if not isinstance(x, Tensor)
        }

    def lengths() -> dict[str, int]:  # of tensors by name: one that grows is a new tensor each time
        return {name: x.numel() for name, x in reachable(subject) if isinstance(x, Tensor)}

    first, long = sizes(), lengths()
    for _ in range(CALLS):
        once(subject)
    then, longer = sizes(), lengths()
    for key, (name, size) in then.items():
        if key in first and size >= first[key][1] + CALLS:
            text = f"{name} has {size - first[key][1]} more elements after {CALLS} calls with the same inputs"
            return error(text, "grows a container")
    for name, size in longer.items():
        if name in long and size > long[name]:
            return error(f"{name} grew from {long[name]} to {size} elements in {CALLS} calls", "grows a container")
    return None


def of_buffers(subject: Subject) -> Finding | None:
    """A gradient is a tensor of its own, which the caller may keep and write to."""
    own = [
        (name, x) for name, x in reachable(subject) if isinstance(x, Tensor) and x.numel() and x.layout == torch.strided
    ]
    kept = {x.untyped_storage().data_ptr(): name for name, x in own}  # own keeps them alive, and the addresses theirs
    leaves = subject.leaves(subject.floats(), subject.wrt)
    xs = [leaves[i] for i in subject.wrt]
    if subject.random:
        reseed(leaves)
    try:
        outputs = subject.call(*leaves)
        grads = pull(outputs, xs, subject.incoming(outputs))
        plainly = pull(outputs, xs, [torch.ones_like(y) for y in outputs])  # a factor of 1 may be left out
    except CLEAR:
        return None
    inputs = {x.untyped_storage().data_ptr(): subject.label(i) for i, x in enumerate(leaves) if isinstance(x, Tensor)}
    for i, g in zip((*subject.wrt, *subject.wrt), (*grads, *plainly), strict=True):
        if g is None or not g.numel():
            continue
        at = g.untyped_storage().data_ptr()
        if at in kept:
            text = f"the gradient of {subject.label(i)} is the memory of {kept[at]}: who writes to one writes to both"
            return error(text, "returns its own buffer as gradient")
        if at in inputs:
            text = f"the gradient of {subject.label(i)} is the memory of {inputs[at]}: who writes to one writes to both"
            return error(text, f"returns {inputs[at]} as gradient", "note")
    copies = [None if g is None else g.clone() for g in grads]
    others = [x.detach() * 0.5 if isinstance(x, Tensor) and x.is_floating_point() else x for x in subject.floats()]
    again: Sequence[Tensor | None] = ()
    try:
        again = subject.gradients(others)[1]
    except CLEAR:
        return None
    for i, g, c in zip(subject.wrt, grads, copies, strict=True):
        if g is not None and c is not None and not torch.equal(g.nan_to_num(0), c.nan_to_num(0)):
            text = f"the gradient of {subject.label(i)} changed when the function was called again"
            return error(text, "returns its own buffer as gradient")
    del again
    return None
