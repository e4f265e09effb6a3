"""How a ratio is measured.

Both sides run in one process, call by call in turn, in an order that is drawn anew every round: blocks of one side after
the other mislead by up to 1.6 times (page faults, clock changes, neighbours on the machine hit one side only), and a fixed
order by a tenth (one side then always finds in the caches what the same other call has left there). The ratio is
the median of the rounds' ratios stock / ours, above 1 if we are faster, its spread their middle half: calls that follow
one another share the machine's mood, and medians of the two sides alone may fall into different ones.
Before anything is timed, both sides compute the same from the same start, or the row is an error.

The limit of a row is the time in which torch moves the same bytes, in the same proportion of reads and writes, in plain
streaming loops (:class:`Traffic`); it is a third call in the same rounds, since a shared machine's bandwidth changes by a
factor of two between minutes.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Result", "Row", "Traffic", "measure"]


@dataclass(frozen=True)
class Traffic:
    """What a call must read and write: ``reads`` and ``writes`` arrays of ``size`` bytes each, writes <= reads."""

    size: int
    reads: int
    writes: int

    @property
    def moved(self) -> int:
        """Bytes."""
        return self.size * (self.reads + self.writes)

    def sweep(self) -> Callable[[], None]:
        """Return a call that moves this and does nothing else worth mentioning.

        ``a += b`` reads two arrays and writes one, ``a *= c`` reads and writes one: x of the former and y of the latter
        read 2x + y and write x + y. In place, as an optimizer's step is: each line is read before it is written. What
        is read beyond that is summed.
        """
        a, b = torch.zeros(2, max(self.size // 4, 1))
        only_read = max(0, self.reads - 2 * self.writes)
        sums = self.reads - only_read - self.writes
        products = self.writes - sums

        def run() -> None:
            for _ in range(sums):
                a.add_(b)
            for _ in range(products):
                a.mul_(1.0)
            for _ in range(only_read):
                b.sum()

        return run


@dataclass
class Row:
    """Something to measure. make() returns (stock, ours, same): two calls to time, and a check that raises if they
    differ."""

    name: str
    against: str
    make: Callable[[], tuple[Callable[[], Any], Callable[[], Any], Callable[[], None]]]
    traffic: Traffic | None = None
    target: float | None = None  # the least ratio that is wanted
    tolerance: float | None = None  # or how far from 1 it may be, where both sides are the same
    group: str = "small"
    seconds: float = 4.0
    quick: bool = True


@dataclass
class Result:
    """Seconds a call, or bytes. ``reached``: limit / ours; None, as ``limit``, where the memory's bandwidth limits nothing."""

    name: str
    against: str
    group: str
    stock: float
    ours: float
    ratio: float
    low: float
    high: float
    rounds: int
    limit: float | None = None
    reached: float | None = None
    target: float | None = None
    tolerance: float | None = None
    unit: str = "s"

    @property
    def aim(self) -> str:
        """What the ratio should be, in words, and whether it is not."""
        if self.tolerance is not None:
            return f"1 ± {self.tolerance:g}" + ("" if abs(self.ratio - 1) <= self.tolerance else " (missed)")
        if self.target is not None:
            return f">= {self.target:g}" + ("" if self.ratio >= self.target else " (missed)")
        return "-"

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
    """Times of each call, round by round, in random order."""
    for call in calls:
        call()
    if repeat is None:  # a sample lasts some 0.2 ms at least, so that the clock's own cost does not show
        repeat = max(1, int(2e-4 / max(timed(calls[1], 3), 1e-9)))
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(0).shuffle
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < minimum:
            shuffle(order)
            for i in order:
                times[i].append(timed(calls[i], repeat))
    finally:
        if gc_was_enabled:
            gc.enable()
    return times


def measure(row: Row, speedup: float = 1.0) -> Result:
    """Measure a row for about row.seconds / speedup."""
    stock, ours, same = row.make()
    same()
    calls = [stock, ours] + ([row.traffic.sweep()] if row.traffic else [])
    times = interleaved(calls, row.seconds / speedup)
    times = [each[len(each) // 10 :] for each in times]  # less the warm-up: page faults, the caches, lazily made state
    by_round = list(zip(*times, strict=True))
    low, ratio, high = statistics.quantiles([t[0] / t[1] for t in by_round], n=4)
    medians = [statistics.median(each) for each in times]
    return Result(
        name=row.name,
        against=row.against,
        group=row.group,
        stock=medians[0],
        ours=medians[1],
        ratio=ratio,
        low=low,
        high=high,
        rounds=len(by_round),
        limit=medians[2] if row.traffic else None,
        reached=statistics.median(t[2] / t[1] for t in by_round) if row.traffic else None,
        target=row.target,
        tolerance=row.tolerance,
    )
