"""Checks of kernels: races, and the stream on which they run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.contract import agree
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import Subject, is_float, said, same

TIMES, THREADS = 20, 4
ROUNDINGS = 1000  # of the largest number, by which sums in another order may differ


@check("function", "races")
def races(subject: Subject) -> Finding:
    """The same call 20 times, on several threads, gives the same bits; else it says by how much they differ."""
    inputs = given(subject)
    torch.set_num_threads(THREADS)  # put back after the check
    first = flat(subject, inputs)
    worst = 0.0
    for _ in range(TIMES - 1):
        again = flat(subject, inputs)
        for x, y in zip(first, again, strict=True):
            if same(x, y):
                continue
            off = float((x - y).abs().nan_to_num(float("inf")).max())
            worst = max(worst, off)
            if not off <= ROUNDINGS * torch.finfo(x.dtype).eps * float(x.abs().max()):
                text = (
                    f"of {TIMES} calls with the same inputs two differ by {off:.3g}, which no order of summing explains"
                )
                return Finding("", "error", f"{off:.2g}", text, "a race, or memory that is read before it is written")
    if worst:
        text = f"{TIMES} calls with the same inputs differ by up to {worst:.2g}: sums in another order, as by atomics"
        return Finding("", "note", f"{worst:.2g}", text, "not the same bits at each call")
    return Finding("", figure=f"{TIMES} calls, the same bits")


def given(subject: Subject) -> list[Any]:
    """The inputs in the dtype in which they were given: kernels have code for each."""
    return [x.detach().clone() if isinstance(x, Tensor) else x for x in subject.inputs]


def flat(subject: Subject, inputs: list[Any]) -> list[Tensor]:
    outputs, grads = subject.gradients(inputs)
    return [*outputs, *(g.detach() for g in grads if g is not None)]


@check("function", "streams")
def streams(subject: Subject) -> Finding | None:
    """On a CUDA stream of its own, behind work that is not done yet, it gives what it gives on the default stream."""
    inputs = given(subject)
    if not any(isinstance(x, Tensor) and x.is_cuda for x in inputs):
        raise Skip("its inputs are not on a CUDA device")
    values, grads = subject.gradients(inputs)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = [torch.zeros_like(x) if is_float(x) else x for x in inputs]
        torch.cuda._sleep(50_000_000)  # some 30 ms: what runs on another stream finds zeros
        for x, y in zip(late, inputs, strict=True):
            if is_float(x):
                x.copy_(y)
        try:
            outputs, found = subject.gradients(late)
        except RuntimeError as error:
            return Finding("", "error", "raised", said(error), "raises on a stream of its own")
        side.synchronize()
    torch.cuda.synchronize()
    names = ("side stream", "default stream")
    cause = "runs on another stream than the current one"
    return agree(subject, "on a side stream", outputs, values, names, cause, True) or agree(
        subject, "on a side stream", found, grads, names, cause
    )
