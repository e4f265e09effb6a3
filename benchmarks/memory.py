"""Peak memory of a call: each side in a fresh process, where nothing that ran before has left its pages or its caches.

``python -m benchmarks.memory NAME stock|ours`` is such a process: it prepares the row's inputs, resets the kernel's
high-water mark of resident memory, runs the side and prints by how many bytes the mark rose above what was there before.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Result

__all__ = ["MemoryRow", "available", "measure_memory"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class MemoryRow:
    """Something to measure: prepare(side) makes the inputs; what a side returns is kept until it is measured.

    kept: measure what is there after the call, and not the most that was.
    """

    name: str
    against: str
    prepare: Callable[[str], Any]
    stock: Callable[[Any], Any]
    ours: Callable[[Any], Any]
    target: float | None = None
    group: str = "memory"
    quick: bool = False
    kept: bool = False


def available() -> bool:
    """Whether the system tells a process its peak: Linux does."""
    return _STATUS.exists() and _RESET.exists()


def _resident(mark: str) -> int:
    """``VmRSS``, what is resident now, or ``VmHWM``, the most that was, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(mark + ":"))
    return int(line.split()[1]) * 1024


def peak_of(call: Callable[[Any], Any], inputs: Any, kept: bool = False) -> int:
    """Bytes by which the process grew at most while ``call(inputs)`` ran; or what of them is kept."""
    _RESET.write_text("5")  # proc(5): sets the mark to what is resident now
    before = _resident("VmRSS")
    result = call(inputs)
    peak = _resident("VmRSS" if kept else "VmHWM")
    del result
    return peak - before


def measure_memory(row: MemoryRow, processes: int = 3) -> Result:
    """Run each side in ``processes`` fresh processes in turn; medians, and the extremes of the ratios."""
    peaks: dict[str, list[int]] = {"stock": [], "ours": []}
    for _ in range(processes):
        for side, found in peaks.items():
            command = [sys.executable, "-m", "benchmarks.memory", row.name, row.against, side]
            found.append(int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    ratios = [s / o for s, o in zip(peaks["stock"], peaks["ours"], strict=True)]
    stock, ours = (float(statistics.median(found)) for found in peaks.values())
    return Result(
        name=row.name,
        against=row.against,
        group=row.group,
        stock=stock,
        ours=ours,
        ratio=stock / ours,
        low=min(ratios),
        high=max(ratios),
        rounds=processes,
        target=row.target,
        unit="B",
    )


if __name__ == "__main__":
    from benchmarks import language, optimizers

    name, against, side = sys.argv[1:]
    rows = (*optimizers.memory_rows(), *language.memory_rows())
    row = next(r for r in rows if (r.name, r.against) == (name, against))
    print(peak_of(getattr(row, side), row.prepare(side), row.kept))
