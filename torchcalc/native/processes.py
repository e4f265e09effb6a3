"""Running compilers side by side, so that a build that is told to stop leaves neither files nor processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Failed", "Job", "cleaning_up", "run"]


class Job(NamedTuple):
    """A command, whether the others are worth running without it, and what it has in its environment besides ours."""

    command: list[str]
    optional: bool = False
    environment: dict[str, str] | None = None


class Failed(Exception):
    """A command failed."""

    def __init__(self, command: list[str], status: int, output: str) -> None:
        super().__init__(command, status, output)
        self.command, self.status, self.output = command, status, output


# Signals that came while a build runs. It looks where it waits, and stops there: an exception out of a signal handler
# could come between the start of a process and the note that it runs.
_signals: list[int] = []


def _stop_if_told() -> None:
    if _signals:
        raise KeyboardInterrupt if _signals[0] == signal.SIGINT else SystemExit(128 + _signals[0])


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """A build that is told to stop, by Ctrl-C, SIGTERM or SIGHUP, first removes what it has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    unhandled = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ours = {number: handler for number, handler in before.items() if handler in unhandled}
    _signals.clear()
    for number in ours:
        signal.signal(number, lambda number, _: _signals.append(number))
    try:
        yield
        _stop_if_told()
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        _signals.clear()


def run(jobs: list[Job], work: Path) -> Failed | None:
    """Runs commands in that directory, one on each processor at a time.

    Returns the failure of an optional one; raises another's.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting, failed = list(enumerate(jobs))[::-1], None
    running: dict[subprocess.Popen[bytes], tuple[Job, Path]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processors:
                number, job = waiting.pop()
                if job.optional and failed:
                    continue
                log = work / f"{number}.log"
                # What a compiler leaves behind goes with our directory, and its children end with it.
                environment = {**os.environ, "TMPDIR": str(work), **(job.environment or {})}
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        job.command, stdout=file, stderr=file, cwd=work, env=environment, start_new_session=True
                    )
                running[process] = job, log
            time.sleep(0.02)
            _stop_if_told()
            for process in [process for process in running if process.poll() is not None]:
                job, log = running.pop(process)
                if process.returncode != 0:
                    failed = Failed(job.command, process.returncode, log.read_text(errors="replace"))
                    if not job.optional:
                        raise failed
    finally:
        for process in running:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return failed
