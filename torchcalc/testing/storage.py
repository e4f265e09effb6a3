"""Checks of memory: what is written to, shared, saved and kept alive, and what backward itself returns."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves

from torchcalc.testing.contract import agree
from torchcalc.testing.graph import nodes
from torchcalc.testing.numeric import need_derivatives, unsupported
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, is_float, pull, said, same


@check("function", "mutation")
def mutation(subject: Subject) -> Finding | None:
    """Forward and backward write to no input and to no grad_output, be the numbers small or large."""
    for scale in (1.0, 100.0, -0.01, 0.0):
        inputs = [x * scale if is_float(x) else x for x in subject.floats()]
        try:
            found = written_to(subject, inputs)
        except CLEAR:
            if scale == 1.0:
                raise
            continue  # numbers that it does not take
        if found is not None:
            where = "" if scale == 1.0 else f", at {scale:g} times the example"
            return replace(found, diagnosis=found.diagnosis + where)
    return None


def written_to(subject: Subject, inputs: Sequence[Any]) -> Finding | None:
    inputs = subject.leaves(inputs, subject.wrt)
    mutable = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    before = [x.clone() if isinstance(x, Tensor) else x for x in mutable]
    with torch.no_grad():
        subject.call(*mutable)
    found = changed(subject, mutable, before, "forward, under no_grad,")
    if found is not None:
        return found
    # tensors with a history, so that even an in-place operation known to autograd succeeds and shows
    tracked = [x * 1 if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    outputs = subject.call(*tracked)
    found = changed(subject, tracked, before, "forward")
    if found is not None:
        return found
    incoming = subject.incoming(outputs)
    kept = [v.clone() for v in incoming]
    pull(outputs, [inputs[i] for i in subject.wrt], incoming)
    for v, k in zip(incoming, kept, strict=True):
        if not same(v, k):
            text = (
                f"backward changed {int((v != k).sum())} of {v.numel()} elements of grad_output, which others may use"
            )
            return Finding("", "error", "", text, "grad_output mutated")
    return changed(subject, [x.detach() if isinstance(x, Tensor) else x for x in tracked], before, "backward")


def changed(subject: Subject, now: Sequence[Any], before: Sequence[Any], when: str) -> Finding | None:
    for i, (x, old) in enumerate(zip(now, before, strict=True)):
        if isinstance(x, Tensor) and not same(x.detach(), old):
            text = f"{when} changed {int((x != old).sum())} of {x.numel()} elements of {subject.label(i)}"
            return Finding("", "error", "", text, "input mutated")
    return None


@check("function", "aliasing")
def aliasing(subject: Subject) -> Finding | None:
    """An output shares memory with an input only as a view that autograd knows of; later calls leave it alone."""
    inputs = [
        x.requires_grad_(i in subject.wrt) if isinstance(x, Tensor) else x for i, x in enumerate(subject.floats())
    ]
    tracked = [x * 1 if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    outputs = subject.call(*tracked)
    note = None
    for k, y in enumerate(outputs):
        for i, x in enumerate(tracked):
            if not isinstance(x, Tensor) or not y.numel() or y is x:
                continue
            if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and not y._is_view():
                text = f"output {k} shares memory with {subject.label(i)}, unknown to autograd: writing to it is silent"
                return Finding("", "error", "", text, f"output aliases {subject.names[i] or f'input {i}'}")
            if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
                note = Finding("", figure=f"a view of {subject.label(i)}")
    kept = [y.detach().clone() for y in outputs]
    others = [x.detach() * 0.5 if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    subject.call(*others)
    if not all(map(same, [y.detach() for y in outputs], kept)):
        text = "the output of a call changed when the function was called again: it is a buffer that is used again"
        return Finding("", "error", "", text, "output overwritten by the next call")
    return note


@check("function", "backward twice")
def backward_twice(subject: Subject) -> Finding | None:
    """Backward again gives the same, and so does backward after other calls of the function."""
    need_derivatives(subject)
    inputs = subject.floats()
    leaves = subject.leaves(inputs, subject.wrt)
    xs = [leaves[i] for i in subject.wrt]
    outputs = subject.call(*leaves)
    v = subject.incoming(outputs)
    first = pull(outputs, xs, v)
    names = ("again", "first time")
    try:
        again = pull(outputs, xs, v)
    except CLEAR as error:
        return unsupported("backward twice", error)
    found = agree(subject, "when backward runs again", again, first, names, "backward twice differs")
    if found is not None:
        return found
    outputs = subject.call(*leaves)
    subject.gradients([x * 0.5 if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs])
    cause = "state shared between calls"
    return agree(subject, "after another call", pull(outputs, xs, v), first, ("after another call", "at once"), cause)


@check("function", "saved tensors")
def saved_tensors(subject: Subject) -> Finding | None:
    """What backward needs is saved where autograd sees it: a change of it after forward raises, or does not matter."""
    need_derivatives(subject)
    leaves = subject.leaves(subject.floats(), subject.wrt)
    xs = [leaves[i] for i in subject.wrt]
    expected = subject.gradients(subject.floats())[1]
    for i, x in enumerate(leaves):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        tracked = [y * 1 if isinstance(y, Tensor) and y.is_floating_point() else y for y in leaves]
        outputs = subject.call(*tracked)
        if any(y.untyped_storage().data_ptr() == tracked[i].untyped_storage().data_ptr() for y in outputs):
            continue
        with torch.no_grad():
            tracked[i].mul_(1.5).add_(0.25)
        cause = f"backward reads {subject.names[i] or f'input {i}'} as it is changed after forward, unnoticed"
        try:
            grads = pull(outputs, xs, subject.incoming(outputs))
        except Exception:  # autograd noticed
            continue
        names = ("after the change", "without it")
        found = agree(subject, f"when {subject.label(i)} changes after forward", grads, expected, names)
        if found is not None:
            return replace(found, cause=cause)
    return kept_on_node(subject)


def kept_on_node(subject: Subject) -> Finding | None:
    """Tensors that a Function keeps as plain attributes of ctx."""
    inputs = subject.floats()
    size = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal size
        size += x.numel() * x.element_size()
        return x

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = subject.call(*subject.leaves(inputs, subject.wrt))
    except CLEAR as error:  # torch.func inside of the function
        return Finding("", figure=f"not counted: {said(error)}")
    floats = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
    ratio = size / max(floats, 1)
    hidden = [
        name
        for node in nodes(outputs)
        for name, value in vars_of(node)
        if any(isinstance(t, Tensor) and t.dim() for t in tree_leaves(value))
    ]
    if hidden:
        text = (
            f"ctx.{hidden[0]} holds a tensor outside save_for_backward: hooks of saved tensors do not see it, "
            " changes of it go unnoticed, and an output kept so leaks"
        )
        return Finding("", "note", f"{size} bytes seen", text, "tensor kept on ctx")
    figure = f"{size} bytes, {ratio:.2g} times the inputs"
    if subject.reference is None:
        return Finding("", figure=figure)
    mine, size = size, 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        subject.call(*subject.leaves(inputs, subject.wrt), fn=subject.reference)
    return Finding("", figure=f"{figure}; the reference {size} bytes", details=dict(saved=mine, reference=size))


def vars_of(node: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in getattr(node, "__dict__", {}).items() if not k.startswith("_")]


@check("function", "raw gradients")
def raw_gradients(subject: Subject) -> Finding | None:
    """What backward returns before the engine mends it has the input's shape, dtype and device, in every dtype."""
    need_derivatives(subject)
    seen = 0
    for dtype in (subject.exact, torch.float32, torch.bfloat16):
        try:
            leaves = subject.leaves(subject.floats(dtype), subject.wrt)
            outputs = subject.call(*leaves)
        except Exception:  # not in that dtype; "dtypes" tells
            continue
        node: Any = outputs[0].grad_fn if len(outputs) == 1 else None
        if not isinstance(node, BackwardCFunction):
            break
        try:
            grads = node.apply(*subject.incoming(outputs))
        except Exception:  # no plain Function after all
            break
        grads = grads if isinstance(grads, tuple) else (grads,)
        for (leaf, _), g in zip(node.next_functions, grads, strict=False):
            x = getattr(leaf, "variable", None)
            if g is None or x is None:
                continue
            seen += 1
            for what, got, right in (
                ("shape", g.shape, x.shape),
                ("dtype", g.dtype, x.dtype),
                ("device", g.device, x.device),
            ):
                if got != right:
                    i = next(k for k, leaf in enumerate(leaves) if leaf is x)
                    text = f"backward returns {what} {shown(got)} for {subject.label(i)} of {shown(right)}"
                    broadcast = what == "shape" and x.numel() < g.numel()
                    return Finding(
                        "",
                        "note",
                        what,
                        text,
                        "missing sum over a broadcast dimension" if broadcast else f"wrong gradient {what}",
                    )
    if not seen:
        raise Skip("no single autograd.Function")
    return None


def shown(x: Any) -> str:
    return str(list(x)) if isinstance(x, torch.Size) else str(x).removeprefix("torch.")


@check("function", "gradient metadata")
def gradient_metadata(subject: Subject) -> Finding | None:
    """Gradients have the shape, dtype, device and layout of their inputs, and do not themselves require grad."""
    need_derivatives(subject)
    for dtype in (subject.exact, torch.float32):
        inputs = subject.floats(dtype)
        try:
            _, grads = subject.gradients(inputs)
        except CLEAR:  # not in that dtype; "dtypes" tells
            continue
        for i, g in zip(subject.wrt, grads, strict=True):
            x = inputs[i]
            if g is None:
                continue
            for what in ("shape", "dtype", "device", "layout"):
                if getattr(g, what) != getattr(x, what):
                    text = (
                        f"gradient of {subject.label(i)}: {what} {getattr(g, what)}, where {getattr(x, what)} is right"
                    )
                    return Finding("", "error", what, text, f"wrong gradient {what}")
            if g.requires_grad:
                text = f"the gradient of {subject.label(i)} requires grad without create_graph"
                return Finding("", "error", "", text, "gradient keeps a graph")
    return None


@check("function", "leaks")
def leaks(subject: Subject) -> Finding | None:
    """With the garbage collector off, outputs, inputs and gradients go at the next call, without a reference to them."""
    need_derivatives(subject)
    inputs = subject.floats()
    enabled = gc.isenabled()
    gc.disable()
    try:
        leaves = subject.leaves(inputs, subject.wrt)
        outputs = subject.call(*leaves)
        alive = [("output", weakref.ref(y)) for y in outputs]
        alive += [(subject.label(i), weakref.ref(leaves[i])) for i in subject.wrt]
        grads: Any = pull(outputs, [leaves[i] for i in subject.wrt], subject.incoming(outputs))
        del outputs, leaves, grads
        subject.call(*subject.leaves(inputs, subject.wrt))  # a module may hold the last call's, as nn.LSTM its weights
        left = [name for name, reference in alive if reference() is not None]
    finally:
        if enabled:
            gc.enable()
    if left:
        text = f"still alive without a reference, until the garbage collector runs: {', '.join(left)}"
        return Finding("", "error", f"{len(left)} tensors", text, "leak")
    return None
