"""Checks of layouts and shapes: strided and expanded inputs, broadcasting, 0-d and empty inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.contract import agree
from torchcalc.testing.graph import custom
from torchcalc.testing.numeric import need_derivatives, slack
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, pull, said


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1], -1)[..., 0]


def offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_ones(4), x.reshape(-1)])[4:].view(x.shape)


def one_off(x: Tensor) -> Tensor:
    """One element after the start of its memory: not aligned as kernels that load several at once want it."""
    return torch.cat([x.new_ones(1), x.reshape(-1)])[1:].view(x.shape)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.dim() and x.shape[0] > 1 else x


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "non-contiguous": strided,
    "transposed": transposed,
    "a view with an offset": offset,
    "one element off alignment": one_off,
    "expanded": expanded,
    "channels_last": channels_last,
}


def layouts_of(subject: Subject) -> dict[str, Callable[[Tensor], Tensor]]:
    """The layouts that its inputs may have: pairs that are complex numbers stay together."""
    return {name: layout for name, layout in LAYOUTS.items() if layout is not one_off or not subject.complex}


@check("function", "layouts")
def layouts(subject: Subject) -> Finding | None:
    """Non-contiguous, transposed, offset, expanded inputs and grad_outputs give what their contiguous copies give."""
    need_derivatives(subject)
    if subject.random:
        raise Skip("random numbers go by the layout")
    inputs = subject.floats()
    for name, layout in layouts_of(subject).items():
        for i in subject.wrt:
            laid = layout(inputs[i])
            if laid.is_contiguous() and laid.storage_offset() == 0:
                continue
            changed = [laid if k == i else x for k, x in enumerate(inputs)]
            cause = f"breaks when {subject.names[i] or f'input {i}'} is {name}"
            try:
                expected = subject.gradients([x.contiguous() if isinstance(x, Tensor) else x for x in changed])
            except CLEAR:
                continue  # outside of the domain
            if not all(t.isfinite().all() for part in expected for t in part if t is not None):
                continue  # a singular point, as equal rows of a determinant are
            try:
                found = laid_out(subject, changed, expected, f"when {subject.label(i)} is {name}", cause)
            except Exception as error:  # its contiguous copy worked
                text = said(error)
                found = Finding("", "note" if isinstance(error, CLEAR) else "error", "raised", text, cause)
            if found is not None:
                return softened(subject, found)
    return incoming_layouts(subject, inputs)


def softened(subject: Subject, found: Finding) -> Finding:
    """A note, if the values are right and every derivative is torch's own: the mistake is not the function's."""
    outputs = subject.call(*subject.leaves(subject.floats(), subject.wrt))
    if found.diagnosis.startswith("gradient of") and not custom(outputs):
        return replace(found, verdict="note", diagnosis=f"{found.diagnosis} (in a derivative of torch)")
    return found


def laid_out(
    subject: Subject,
    inputs: Sequence[Any],
    expected: tuple[Sequence[Tensor], Sequence[Tensor | None]],
    what: str,
    cause: str,
) -> Finding | None:
    leaves = [x.detach().requires_grad_(i in subject.wrt) if isinstance(x, Tensor) and x.is_floating_point() else x
              for i, x in enumerate(inputs)]  # fmt: skip
    outputs = subject.call(*leaves)
    grads = pull(outputs, [leaves[i] for i in subject.wrt], subject.incoming(outputs))
    names = ("strided", "contiguous")
    return agree(subject, what, outputs, expected[0], names, cause, True) or agree(
        subject, what, grads, expected[1], names, cause
    )


def incoming_layouts(subject: Subject, inputs: Sequence[Any]) -> Finding | None:
    outputs = subject.call(*inputs)
    pairs = any(y._base is not None and y._base.is_complex() for y in outputs)
    for name, layout in layouts_of(subject).items():
        if pairs and layout is one_off:
            continue
        vs = [layout(v) for v in subject.incoming(outputs)]
        cause = f"breaks when grad_output is {name}"
        _, expected = subject.gradients(inputs, incoming=[v.contiguous() for v in vs])
        try:
            _, grads = subject.gradients(inputs, incoming=vs)
        except Exception as error:  # its contiguous copy worked
            text = said(error)
            return Finding("", "error", "raised", text, cause)
        found = agree(subject, f"when grad_output is {name}", grads, expected, ("strided", "contiguous"), cause)
        if found is not None:
            return found
    return None


@check("function", "broadcast")
def broadcast(subject: Subject) -> Finding | None:
    """An input of size 1 in a dimension that is broadcast gets the sum of the gradients of its copies."""
    inputs, seen = subject.floats(), 0
    # Not a module's own parameters: nobody gives it others, and a kernel that does not check ends the process.
    for i, dim in itertools.product([i for i in subject.wrt if i < subject.handed], (0, 1)):
        x = inputs[i]
        peers = [y for k, y in enumerate(inputs) if k != i and isinstance(y, Tensor) and y.shape == x.shape]
        if not peers or x.dim() <= dim or x.shape[dim] < 2:
            continue
        small = x.narrow(dim, 0, 1)
        wide = [small.expand_as(x).contiguous() if k == i else y for k, y in enumerate(inputs)]
        try:
            outputs, grads = subject.gradients([small if k == i else y for k, y in enumerate(inputs)], (i,))
        except CLEAR:
            continue  # does not broadcast
        truths, expected = subject.gradients(wide, (i,))
        if any(
            y.shape != t.shape or ((y - t).abs() > slack(subject, t)).any()
            for y, t in zip(outputs, truths, strict=True)
        ):
            continue  # that shape has another meaning
        seen += 1
        summed = None if expected[0] is None else expected[0].sum(dim, keepdim=True)
        cause = "missing sum over a broadcast dimension"
        part = replace(subject, wrt=(i,))
        found = agree(
            part, f"broadcast along dimension {dim}", grads, [summed], ("broadcast", "sum over copies"), cause
        )
        if found is not None:
            return found
    if not seen:
        raise Skip("does not broadcast")
    return Finding("", figure=f"{seen} broadcasts")


@check("function", "shapes")
def shapes(subject: Subject) -> Finding | None:
    """An elementwise function is the same on 0-d, empty and reshaped inputs, and its gradients have their shape."""
    inputs = subject.floats()
    outputs = subject.call(*inputs)
    if len(outputs) != 1 or not elementwise(subject, inputs):
        raise Skip("not elementwise")
    _, whole = subject.gradients(inputs, incoming=[v.clone() for v in subject.incoming(outputs)])
    for name, change in (
        ("1-d", lambda x: x.reshape(-1)),
        ("3-d", lambda x: x.reshape(1, -1, 1)),
        ("4-d", lambda x: x.reshape(1, 1, -1, 1)),
        ("0-d", lambda x: x.reshape(-1)[0]),
        ("empty", lambda x: x.new_empty((0, 3))),
        ("empty in the middle", lambda x: x.new_empty((2, 0, 3))),
        ("5-d", lambda x: x.reshape(1, 1, *x.shape, 1)),
        ("1 element", lambda x: x.reshape(-1)[:1]),
    ):
        changed = [change(x) if isinstance(x, Tensor) else x for x in inputs]
        try:
            incoming = [change(v) for v in subject.incoming(outputs)]
            values, grads = subject.gradients(changed, incoming=incoming)
        except Exception as error:  # the same numbers in another shape worked
            text = said(error)
            return Finding("", "note", "raised", text, f"refuses {name} inputs")
        for i, g in zip(subject.wrt, grads, strict=True):
            if g is not None and g.shape != changed[i].shape:
                return Finding(
                    "", "error", "shape", f"{list(g.shape)} for {list(changed[i].shape)}", "wrong gradient shape"
                )
        if change(outputs[0]).shape != values[0].shape:
            return Finding(
                "", "error", "shape", f"{name} input gives {list(values[0].shape)}", f"wrong shape for {name} inputs"
            )
        found = agree(
            subject, f"of {name} inputs", values, [change(outputs[0])], (name, "of the example"), f"{name} inputs", True
        )
        if found is not None and values[0].numel():
            return found
        if not values[0].numel():
            continue
        expected = [None if g is None else change(g) for g in whole]
        found = agree(subject, f"of {name} inputs", grads, expected, (name, "of the example"), f"{name} inputs")
        if found is not None:
            return found
    return None


def elementwise(subject: Subject, inputs: Sequence[Any]) -> bool:
    """Whether each output depends on the elements at its own place alone, and in the same way everywhere."""

    def flipped(x: Any) -> Any:
        return x.reshape(-1).flip(0) if isinstance(x, Tensor) else x

    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if subject.random or not tensors[0].numel() or len(inputs) > subject.handed:
        return False
    if any(x.shape != tensors[0].shape for x in tensors):
        return False
    try:
        wholes = subject.call(*inputs)
        mirrored = subject.call(*map(flipped, inputs))
        halves = subject.call(*(flipped(x)[: x.numel() // 2] if isinstance(x, Tensor) else x for x in inputs))
    except Exception:  # no other shape works, so it is something else
        return False

    return all(
        whole.shape == tensors[0].shape
        and alike(back.flip(0), whole.reshape(-1), slack(subject, whole))
        and alike(half, whole.reshape(-1).flip(0)[: len(half)], slack(subject, whole))
        for whole, back, half in zip(wholes, mirrored, halves, strict=True)
    )


def alike(x: Tensor, y: Tensor, allowed: float) -> bool:
    """Of one shape, and equal up to rounding; NaN and infinities where the other has them."""
    return x.shape == y.shape and bool((((x - y).abs() <= allowed) | (x == y) | (x.isnan() & y.isnan())).all())
