"""How a ratio is measured.

Both sides run in one process, call by call in turn, and the order is swapped every round: blocks of one side after the
other mislead by up to 1.6 times (page faults, clock changes, neighbours on the machine hit one side only). The ratio is
median(stock) / median(ours), above 1 if we are faster; its spread is the middle half of the ratios of the rounds.
Before anything is timed, both sides compute the same from the same start, or the row is an error.

The limit of a row is the time in which its bytes could be moved at the rate of :func:`streaming_rate`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

__all__ = ["Result", "Row", "measure", "streaming_rate"]


@dataclass
class Row:
    """Something to measure. make() returns (stock, ours, same): two calls to time, and a check that raises if they
    differ."""

    name: str
    against: str
    make: Callable[[], tuple[Callable[[], Any], Callable[[], Any], Callable[[], None]]]
    bytes_moved: int = 0
    target: float | None = None
    group: str = "small"
    seconds: float = 4.0
    quick: bool = True


@dataclass
class Result:
    """Times in seconds a call."""

    name: str
    against: str
    group: str
    stock: float
    ours: float
    ratio: float
    low: float
    high: float
    rounds: int
    limit: float
    target: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def timed(call: Callable[[], Any], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def interleaved(
    calls: list[Callable[[], Any]], seconds: float, repeat: int | None = None, minimum: int = 5
) -> list[list[float]]:
    """Times of each call, round by round, in alternating order."""
    for call in calls:
        call()
    if repeat is None:  # a sample lasts some 0.2 ms at least, so that the clock's own cost does not show
        repeat = max(1, int(2e-4 / max(timed(calls[-1], 3), 1e-9)))
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < minimum:
            for i in order:
                times[i].append(timed(calls[i], repeat))
            order.reverse()
    finally:
        if gc_was_enabled:
            gc.enable()
    return times


def measure(row: Row, rate: float, speedup: float = 1.0) -> Result:
    """Measure a row for about row.seconds / speedup."""
    stock, ours, same = row.make()
    same()
    stock_times, our_times = interleaved([stock, ours], row.seconds / speedup)
    skip = len(stock_times) // 10  # warm-up: page faults, the caches, lazily made state
    stock_times, our_times = stock_times[skip:], our_times[skip:]
    ratios = [s / o for s, o in zip(stock_times, our_times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    a, b = statistics.median(stock_times), statistics.median(our_times)
    return Result(
        name=row.name,
        against=row.against,
        group=row.group,
        stock=a,
        ours=b,
        ratio=a / b,
        low=low,
        high=high,
        rounds=len(ratios),
        limit=row.bytes_moved / rate if row.bytes_moved else float("nan"),
        target=row.target,
    )


def streaming_rate(megabytes: int = 512, rounds: int = 7) -> float:
    """Bytes a second that all threads together read and write: the best of a few sweeps of ``a += b`` and ``a *= c``.

    Sums in place, since an optimizer's step is one: nothing is allocated, and each line of a is read before it is
    written.
    """
    a = torch.zeros(megabytes * 2**20 // 4)
    b = torch.zeros_like(a)
    n = a.numel() * a.element_size()
    kernels: Iterable[tuple[Callable[[], Any], int]] = [(lambda: a.add_(b), 3 * n), (lambda: a.mul_(1.0), 2 * n)]
    return max(moved / min(timed(call, 1) for _ in range(rounds)) for call, moved in kernels)
