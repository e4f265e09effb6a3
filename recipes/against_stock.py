"""The same steps by torchcalc's parts and by torch's: equal losses, and what they cost."""

import os
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes.gpt import GPT, Kind

KINDS: tuple[Kind, Kind] = ("torchcalc", "torch")


class Cost(NamedTuple):
    """What some steps of one kind came to."""

    loss: float  #: the last one
    seconds: float  #: of a step, the median
    peak: int  #: bytes beyond what was there before, in a step


def compare(
    make: Callable[[Kind], GPT],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    autocast: Any,
    lr: float,
) -> dict[Kind, Cost]:
    """Train two nets side by side, which begin alike, turn by turn.

    Args:
        make: makes a net of either kind, alike in every parameter.
        batches: a step each; the first two are not timed.
        device: where.
        autocast: makes the context of a forward pass.
        lr: of the steps.
    """
    nets = {kind: make(kind).to(device) for kind in KINDS}
    optimizers = {kind: nets[kind].optimizer(lr, 0.1) for kind in KINDS}
    losses: dict[Kind, float] = {}
    seconds: dict[Kind, list[float]] = {kind: [] for kind in KINDS}

    def step(kind: Kind, words: Tensor, target: Tensor) -> None:
        optimizers[kind].zero_grad()
        with autocast():
            loss = nets[kind](words, target)
        loss.backward()
        optimizers[kind].step()
        losses[kind] = loss.item()  # waits for the device

    batch = None
    for i, each in enumerate(batches):
        batch = tuple(x.to(device) for x in each)
        for kind in KINDS if i % 2 else KINDS[::-1]:
            begin = time.perf_counter()
            step(kind, *batch)
            seconds[kind].append(time.perf_counter() - begin)
    assert batch is not None
    found = dict(losses)
    for optimizer in optimizers.values():
        optimizer.zero_grad()  # what was allocated before is freed outside of the steps that are watched
    peaks = {kind: peak_of(lambda kind=kind: step(kind, *batch), device) for kind in KINDS}  # type: ignore[misc]
    return {kind: Cost(found[kind], median(seconds[kind][2:] or seconds[kind]), peaks[kind]) for kind in KINDS}


def peak_of(call: Callable[[], None], device: torch.device) -> int:
    """The most bytes that are allocated within a call beyond those before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr that it began and ended
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
