"""Checks of numbers: kinks and ties, huge inputs, NaN and infinity, narrow dtypes, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import compare, worst
from torchcalc.testing.graph import custom
from torchcalc.testing.numeric import need_derivatives
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding, Verdict
from torchcalc.testing.subject import CLEAR, Subject, is_float, normal, pull, said

NARROW = (torch.float32, torch.bfloat16, torch.float16)


@check("function", "dtypes")
def dtypes(subject: Subject) -> Finding | None:
    """float32, bfloat16 and float16 in, the same dtype out (or the reference's)."""
    notes = []
    for dtype in NARROW:
        inputs = subject.floats(dtype)
        try:
            outputs, _ = subject.gradients(inputs)
        except Exception as error:  # the exact dtype worked
            clear = isinstance(error, CLEAR)
            text = f"{dtype}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            notes.append(Finding("", "note" if clear else "error", "raised", text, f"refuses {short(dtype)}"))
            continue
        if subject.reference is not None:
            truths = subject.call(*inputs, fn=subject.reference)
            right = [y.dtype for y in truths]
        else:
            right = [dtype] * len(outputs)
        if [y.dtype for y in outputs] != right:
            text = f"{dtype} in gives {[str(y.dtype) for y in outputs]} out, where {list(map(str, right))} is expected"
            notes.append(
                Finding("", "error" if subject.reference is not None else "note", "dtype", text, "wrong output dtype")
            )
    return worst(notes)


@check("function", "precision")
def precision(subject: Subject) -> Finding | None:
    """The error against float64 truth is at most that of the reference, or near that of rounding the inputs once."""
    need_derivatives(subject)
    if subject.exact != torch.float64:
        raise Skip("takes no float64")
    notes, figures = [], []
    for dtype in NARROW:
        narrow = subject.floats(dtype)
        exact = [x.double() if is_float(x) else x for x in narrow]
        fn = subject.reference or subject.fn
        eps = torch.finfo(dtype).eps
        nudged = [x * (1 + eps * normal(x, 60 + k)) if is_float(x) else x for k, x in enumerate(exact)]
        try:
            shapes = subject.call(*narrow)
            incoming = [v.to(torch.bfloat16) for v in subject.incoming(shapes)]
            mine = results(subject, narrow, incoming, None)
            theirs = results(subject, narrow, incoming, fn) if subject.reference else None
            truth, moved = results(subject, exact, incoming, fn), results(subject, nudged, incoming, fn)
        except Exception as error:  # "dtypes" tells
            figures.append(f"no {short(dtype)}: {type(error).__name__}")
            continue
        beyond = [
            float(t.abs().max())
            for t in truth
            if t is not None and t.numel() and t.abs().max() > torch.finfo(dtype).max / 2
        ]
        if beyond:
            figures.append(f"{short(dtype)} cannot hold {max(beyond):.2g}")
            continue
        # J'v is made of products with v that may cancel, as of a sigmoid that has saturated, and has their rounding
        flat = sum(float((t * v).abs().sum()) for t, v in zip(truth, incoming, strict=False) if t is not None)
        torchs = not custom(subject.call(*subject.leaves(subject.floats(), subject.wrt)))
        for k, (m, t, n) in enumerate(zip(mine, truth, moved, strict=True)):
            if m is None or t is None or n is None or not t.numel() or not (t.isfinite().all() and n.isfinite().all()):
                continue
            natural = float((n - t).abs().max()) + eps * float(t.abs().max()) + torch.finfo(dtype).tiny
            natural += eps * flat if k >= len(shapes) and flat == flat else 0.0
            gap = float((m.double() - t).abs().max())
            own = float((theirs[k].double() - t).abs().max()) if theirs is not None and theirs[k] is not None else 0.0  # type: ignore[union-attr]
            what = "output" if k < len(shapes) else f"gradient of {subject.label(subject.wrt[k - len(shapes)])}"
            off = float((m.double() * t).sum() / (t * t).sum()) - 1 if t.any() else 0.0
            scaled = abs(off) > 32 * eps and float(t.abs().max()) > 4 * eps * flat and gap > 16 * (natural - eps * flat)
            if scaled and k >= len(shapes) and subject.reference is None:
                text = f"{what} in {short(dtype)} is {1 + off:.3g} times that in float64"
                notes.append(Finding("", "error", f"{1 + off:.3g}", text, f"another gradient in {short(dtype)}"))
            if gap > 16 * natural + 4 * own or gap != gap:
                verdict: Verdict = (
                    "error" if subject.reference is not None or gap > 1e4 * natural or gap != gap else "note"
                )
                if subject.reference is None and dtype != torch.float32 and torchs:
                    verdict = "note"  # operations of torch, which are not meant to hold in such a dtype
                text = f"{what} in {short(dtype)}: error {gap:.2g}, where rounding the inputs alone makes {natural:.2g}"
                text += f" and the reference {own:.2g}" if theirs is not None else ""
                notes.append(Finding("", verdict, f"{gap / natural:.3g} roundings", text, "loses digits"))
    return worst(notes) or Finding("", figure="; ".join(figures))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def results(subject: Subject, inputs: Sequence[Any], incoming: Sequence[Tensor], fn: Any) -> tuple[Tensor | None, ...]:
    leaves = subject.leaves(inputs, subject.wrt)
    outputs = subject.call(*leaves, fn=fn)
    vs = [v.to(y.dtype) for v, y in zip(incoming, outputs, strict=True)]
    return (*(y.detach() for y in outputs), *pull(outputs, [leaves[i] for i in subject.wrt], vs))


@check("function", "autocast")
def autocast(subject: Subject) -> Finding | None:
    """Under autocast, with backward inside or outside of it: it runs, dtypes of gradients stay, values are near."""
    need_derivatives(subject)
    inputs = subject.floats(torch.float32)
    try:
        subject.call(*inputs)
    except CLEAR as error:
        raise Skip(f"takes no float32: {said(error)}") from error
    device = inputs[subject.wrt[0]].device.type
    if not torch.amp.is_autocast_available(device):
        raise Skip(f"no autocast on {device}")
    values, plain = subject.gradients(inputs)
    torchs = not custom(subject.call(*subject.leaves(inputs, subject.wrt)))
    for inside in (True, False):
        leaves = subject.leaves(inputs, subject.wrt)
        xs = [leaves[i] for i in subject.wrt]
        try:
            with torch.autocast(device, torch.bfloat16):
                outputs = subject.call(*leaves)
                if inside:
                    grads = pull(outputs, xs, subject.incoming(outputs))
            if not inside:
                grads = pull(outputs, xs, subject.incoming(outputs))
        except Exception as error:  # without autocast it worked
            note = subject.reference is not None and refuses_autocast(subject, inputs, device)
            text = f"backward {'inside' if inside else 'outside'} of autocast: {said(error)}"
            asked = torchs or (isinstance(error, RuntimeError) and "autocast" in str(error))
            return Finding("", "note" if note or asked else "error", "raised", text, "raises under autocast")
        if subject.reference is not None:
            with torch.autocast(device, torch.bfloat16):
                right = [y.dtype for y in subject.call(*inputs, fn=subject.reference)]
            if [y.dtype for y in outputs] != right:
                text = f"output {[short(y.dtype) for y in outputs]} under autocast, not {list(map(short, right))}"
                return Finding("", "note", "dtype", text, "another output dtype under autocast")
        for what, got, expected in (("output", outputs, values), ("gradient", grads, plain)):
            for g, e in zip(got, expected, strict=True):
                if g is None or e is None or not e.numel():
                    continue
                allowed = 0.25 * float(e.abs().max()) + 1e-3
                found = compare(f"{what} under autocast", g.detach().float(), e, allowed, names=("autocast", "float32"))
                if found is not None:
                    return replace(found, cause="wrong under autocast")
    return None


def refuses_autocast(subject: Subject, inputs: Sequence[Any], device: str) -> bool:
    try:
        with torch.autocast(device, torch.bfloat16):
            subject.call(*inputs, fn=subject.reference)
    except CLEAR:
        return True
    return False
