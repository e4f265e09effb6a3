"""The run of a list of checks: here, or in a process of its own; with a bar on the terminal, and a budget of time.

In a process of its own a kernel that aborts, or never comes back, becomes a finding. The process is forked, so that
closures and lambdas need no pickling, and each finding comes back as it is made. When it ends early, the check that was
running gets the blame, and a new process goes on with the next one.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from torchcalc.testing.registry import Check, run_one
from torchcalc.testing.report import Finding, Report

__all__ = ["Job", "Tell", "apart", "play", "run"]

#: What a job tells as it goes: ("name", the subject's), ("start", a check's name), ("end", a finding).
Tell = Callable[[str, Any], None]
#: Makes the subject and plays checks: job(checks, tell, time.monotonic() at which the budget ends).
Job = Callable[[Sequence[Check], Tell, float], None]
GRACE = 60.0  # seconds that the last check may take beyond the budget before its process is ended

FOREVER = float("inf")


def play(name: str, checks: Sequence[Check], fresh: Callable[[], Any], tell: Tell, until: float) -> None:
    """Run checks of a subject one after the other; those that would start after the budget's end are left out."""
    tell("name", name)
    for c in checks:
        if time.monotonic() > until:
            tell("end", Finding(c.name, "not checked", diagnosis="left out: the time budget is used up"))
            continue
        tell("start", c.name)
        tell("end", run_one(c, fresh))


def run(
    job: Job, checks: Sequence[Check], progress: bool | None = None, seconds: float | None = None, isolate: bool = False
) -> Report:
    """The report of a job.

    Args:
        job: makes the subject and plays the checks.
        checks: which.
        progress: whether to show a bar on stderr; None: if it is a terminal.
        seconds: the time budget.
        isolate: run in a process of its own.

    Raises:
        ValueError: seconds is not above zero.
        RuntimeError: isolate, and a process cannot be forked here.
        Exception: what making the subject raises.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds={seconds}: give a time budget above zero")
    begin = time.monotonic()
    until = FOREVER if seconds is None else begin + seconds
    bar = Bar(sys.stderr.isatty() if progress is None else progress, len(checks), begin, seconds)
    try:
        if isolate:
            _apart(job, checks, bar, until)
        else:
            job(checks, bar.tell, until)
    finally:
        bar.clear()
    return Report(bar.name, tuple(bar.findings))


class Bar:
    """Keeps the findings as they come, and shows how far the run is."""

    def __init__(self, shown: bool, count: int, begin: float, seconds: float | None) -> None:
        self.shown, self.count, self.begin, self.seconds = shown, count, begin, seconds
        self.name, self.running = "", ""
        self.findings: list[Finding] = []

    def tell(self, kind: str, value: Any) -> None:
        if kind == "name":
            self.name = value
        elif kind == "start":
            self.running = value
            self.show()
        else:
            self.findings.append(value)
            self.running = ""

    def show(self) -> None:
        if self.shown:
            done = len(self.findings)
            filled = 20 * done // max(self.count, 1)
            spent = f"{time.monotonic() - self.begin:.0f} s" + (f" of {self.seconds:g}" if self.seconds else "")
            text = f"{self.name} [{'#' * filled}{'.' * (20 - filled)}] {done + 1}/{self.count} {spent}: {self.running}"
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _apart(job: Job, checks: Sequence[Check], bar: Bar, until: float) -> None:
    """Run the job in processes of its own, as many as it ends."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise RuntimeError("isolate=True needs os.fork, which this system lacks; pass isolate=False")
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "isolate=True forks a process, and CUDA, which this one has used already, does not survive that; pass "
            "isolate=False, or run python -m torchcalc.testing"
        )

    importlib.import_module("torch._dynamo")  # torch does it late, and each process would spend the seconds again
    left = list(checks)
    while left:
        end = place = ""
        for kind, value in _talk(job, left, until):
            if kind == "raised":
                raise value
            if kind == "over":
                end = value
            elif kind == "at":
                place = value
            else:
                bar.tell(kind, value)
        done = {f.check for f in bar.findings}
        left = [c for c in left if c.name not in done]
        if end and not bar.running:
            raise RuntimeError(f"the process {end} while the subject is made: what makes it does that, no check{place}")
        if end:
            text = f"the process {end} in this check; the subject, or a kernel that it calls, does that{place}"
            bar.tell("end", Finding(bar.running, "error", end, text, f"the process {end}"))
            left = left[1:]


def _talk(job: Job, checks: Sequence[Check], until: float) -> Iterator[tuple[str, Any]]:
    """What a child process tells; ("over", how) if it ends before its time."""
    trace = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the pipe
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(job, checks, until, there, trace))
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads: the child uses one thread, and takes no lock of another.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    there.close()
    try:
        while True:
            if not here.poll(None if until == FOREVER else max(until + GRACE - time.monotonic(), 0)):
                yield "over", f"does not end, {GRACE:g} s after the time budget,"
                return
            try:
                kind, value = here.recv()
            except EOFError:
                child.join()
                code = child.exitcode or 0
                how = f"is ended by {signal.Signals(-code).name}" if code < 0 else f"exits with status {code}"
                yield "over", how
                yield "at", _place(trace)
                return
            if kind == "done":
                return
            yield kind, value
    finally:
        here.close()
        trace.close()
        child.kill()
        child.join()


def apart(call: Callable[..., None], *arguments: Any) -> None:
    """Call it in a process of its own; what it raises is raised here.

    Raises:
        ValueError: the process ends before the call does.
    """
    for kind, value in _talk(lambda *_: call(*arguments), (), FOREVER):
        if kind == "raised":
            raise value
        raise ValueError(f"{arguments[0]}: the process {value} when it is called")


def _place(trace: Any) -> str:
    """Where the subject was when its process ended: the innermost line of Python that is neither torch's nor ours."""
    trace.seek(0)
    for line in trace.read().splitlines():
        found = re.match(r'  File "(.+)", line (\d+) in (\w+)', line)
        if found and not any(part in found[1] for part in ("/torch/", "/torchcalc/testing/", "<")):
            return f"\nin {found[3]}, {found[1]}:{found[2]}"
    return ""


def _child(job: Job, checks: Sequence[Check], until: float, pipe: Connection, trace: Any) -> None:
    import resource  # of Unix, as fork is

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no file of gigabytes for what is found here
    faulthandler.disable()  # where it was enabled, others may have taken its signals since
    faulthandler.enable(trace, all_threads=False)
    torch.set_num_threads(1)  # OpenMP's threads do not come through a fork

    def tell(kind: str, value: Any) -> None:
        try:
            pipe.send((kind, value))
        except Exception:  # details, or an exception, that cannot be pickled
            if isinstance(value, Finding):
                value = Finding(value.check, value.verdict, value.figure, value.diagnosis, value.cause)
            else:
                value = RuntimeError(f"{type(value).__name__}: {value}")
            pipe.send((kind, value))

    try:
        torch.ones((), requires_grad=True, device="cpu").square().backward()
    except RuntimeError as error:  # of autograd, which knows that its threads are gone
        text = (
            f"isolate=True forks a process, which this one does not survive: {error}; pass isolate=False, or run python "
            "-m torchcalc.testing"
        )
        return tell("raised", RuntimeError(text))
    try:
        job(checks, tell, until)
    except Exception as error:
        tell("raised", error)
    else:
        tell("done", None)
