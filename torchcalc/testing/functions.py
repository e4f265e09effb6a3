"""check_function and check_loss: run the registered checks of a function or a loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

# isort: off
from torchcalc.testing import (  # noqa: F401  they register their checks, in the order of the report
    derivatives,
    second,
    third,
    upstream,
    contract,
    layouts,
    storage,
    kernels,
    extremes,
    precision,
    side_effects,
    regions,
    rows,
    transforms,
    losses,
    targets,
    laws,
    recognised,
    twins,
)

# isort: on
from torchcalc.testing.belongings import untouched
from torchcalc.testing.graph import of_torch, opaque
from torchcalc.testing.registry import Check, Kind, select
from torchcalc.testing.report import Finding, Report
from torchcalc.testing.runs import Tell, play, run
from torchcalc.testing.settings import left_alone, restore, settings
from torchcalc.testing.subject import CALLERS_DEVICE, Subject, make_subject

__all__ = ["assert_function", "assert_loss", "check_function", "check_loss"]


def check_function(
    fn: Callable[..., Any],
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    wrt: Sequence[int] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    compile: bool = False,
    progress: bool | None = None,
    name: str | None = None,
    seconds: float | None = None,
    isolate: bool = False,
) -> Report:
    """Check the derivatives and the contract of a differentiable function; the global RNG is left as it was.

    Args:
        fn: any callable: a function of torch, ``YourFunction.apply``, a module (whose parameters are differentiated
            too), a ``functools.partial``.
        *inputs: example arguments, tensors or anything else, small (up to some hundred numbers) and away from kinks;
            they are copied, and the float ones are used in float64. Lists and dicts that hold float tensors are opened:
            ``wrt`` counts their leaves.
        reference: a trusted callable of the same arguments, to compare values, gradients and rounding with.
        wrt: indices of the inputs to differentiate; by default all float tensors. Leave out those whose derivative is
            meant to be missing.
        include: names of the checks to run; by default all but the slow ones.
        exclude: names of checks to leave out.
        compile: run the checks that compile as well; they take seconds.
        progress: show progress on stderr; by default on a terminal.
        name: what the report is headed with.
        seconds: the time budget; checks that would start later are "not checked".
        isolate: run in a process of its own, so that a kernel that aborts is a finding and not the end.

    Returns:
        A report that is true when there are no errors, and prints on one screen.

    Raises:
        ValueError: no input is a float tensor, or one is sparse or on meta; ``wrt`` or a name of a check is wrong.
        RuntimeError: ``isolate`` where no process can be forked: on Windows, or after CUDA or a thread of autograd was used.

    >>> report = check_function(torch.tanh, torch.linspace(-1, 1, 6), include=["gradient", "adjoint"])
    >>> bool(report), [f.verdict for f in report]
    (True, ['ok', 'ok'])
    """
    how: dict[str, Any] = dict(progress=progress, seconds=seconds, isolate=isolate)
    return _check(("function",), fn, inputs, reference, wrt, include, exclude, compile, name, how)


def check_loss(
    loss: Callable[..., Any],
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    wrt: Sequence[int] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    compile: bool = False,
    progress: bool | None = None,
    name: str | None = None,
    seconds: float | None = None,
    isolate: bool = False,
) -> Report:
    """:func:`check_function`, and what only losses have: reductions, ignore_index, weights, micro-batches, and so on.

    Args:
        loss: a module or a function of (input, target, ...). Its options ``reduction``, ``ignore_index``, ``weight``,
            ``pos_weight`` and ``label_smoothing`` are found by name, and checked if they are there.
        *inputs: example arguments; the first dimension is that of the samples.
        reference, wrt, include, exclude, compile, progress, name, seconds, isolate: as for :func:`check_function`.

    Returns:
        A report that is true when there are no errors, and prints as a table.

    Raises:
        ValueError: no input is a float tensor; ``wrt`` or a name of a check is wrong.

    >>> report = check_loss(torch.nn.MSELoss(), torch.rand(4, 3), torch.rand(4, 3), include=["gradient", "reductions"])
    >>> bool(report)
    True
    """
    how: dict[str, Any] = dict(progress=progress, seconds=seconds, isolate=isolate)
    return _check(("function", "loss"), loss, inputs, reference, wrt, include, exclude, compile, name, how)


def assert_function(fn: Callable[..., Any], *inputs: Any, **options: Any) -> Report:
    """:func:`check_function`, but errors raise.

    Args:
        fn, *inputs: as for :func:`check_function`.
        **options: its keyword arguments.

    Raises:
        AssertionError: with the report as its message.

    >>> assert_function(torch.sin, torch.rand(3), include=["gradient"]).errors
    ()
    """
    report = check_function(fn, *inputs, **options)
    report.raise_errors()
    return report


def assert_loss(loss: Callable[..., Any], *inputs: Any, **options: Any) -> Report:
    """:func:`check_loss`, but errors raise.

    Args:
        loss, *inputs: as for :func:`check_loss`.
        **options: its keyword arguments.

    Raises:
        AssertionError: with the report as its message.

    >>> assert_loss(torch.nn.L1Loss(), torch.rand(3), torch.rand(3) + 2, include=["gradient"]).errors
    ()
    """
    report = check_loss(loss, *inputs, **options)
    report.raise_errors()
    return report


def _check(
    kinds: tuple[Kind, ...], fn: Any, inputs: Sequence[Any], reference: Any, wrt: Any, include: Any, exclude: Any,
    compile: bool, name: str | None, how: dict[str, Any],
) -> Report:  # fmt: skip
    def job(checks: Sequence[Check], tell: Tell, until: float) -> None:
        with surroundings(inputs), untouched(fn, reference, inputs):
            subject = prepare(fn, inputs, reference, wrt, name)

            def located(kind: str, value: Any) -> None:
                tell(kind, explained(subject, value) if kind == "end" else value)

            play(subject.name, checks, subject.fresh, located, until)

    return run(job, select(kinds, include, exclude, compile), **how)


#: What the checks of second and higher derivatives are called, and that which takes backward twice for forward mode.
HIGHER = (
    "adjoint",
    "second derivative",
    "derivative by grad_output",
    "third derivative",
    "forward over reverse",
    "hessian",
)


def explained(subject: Subject, finding: Finding) -> Finding:
    """The finding with the place of the backward; a note, where it is torch's mistake, or declared."""
    if finding.verdict != "error":
        return finding
    kind = opaque(subject.given)
    silent = "silently zero" in finding.cause
    soft = ""
    if kind and silent and finding.check in ("adjoint", "forward mode", "func.jvp"):
        soft = f"through {kind} torch gives no tangent, and says nothing: forward mode is zero"
    elif subject.once and silent and finding.check in HIGHER:
        soft = (
            "its backward is declared once_differentiable: torch raises, or leaves the second derivative out silently"
        )
    elif not subject.custom and finding.check in HIGHER and "not finite" in finding.cause:
        soft = "a second derivative of torch itself"
    elif of_torch(subject.given):
        soft = "in a function of torch itself"
    if soft:
        return replace(finding, verdict="note", diagnosis=f"{soft}\n{finding.diagnosis}")
    if not subject.backward_at:
        return finding
    text = f"{finding.diagnosis}\n{subject.backward_at}"
    return replace(finding, diagnosis=text, details={**finding.details, "backward": subject.backward_at})


@contextmanager
def surroundings(inputs: Sequence[Any]) -> Iterator[None]:
    """Grad mode on, and one thread, for examples are small; afterwards generators and threads are as they were."""
    devices = {x.device.index or 0 for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"}
    default = torch.get_default_device()
    elsewhere = default.type != "cpu"
    token = CALLERS_DEVICE.set(default if elsewhere else None)
    # the mode slows every call: not entered in vain
    here = torch.device("cpu") if elsewhere else nullcontext()
    with left_alone(), torch.random.fork_rng(devices=sorted(devices)), torch.enable_grad(), here:
        torch.set_num_threads(1)  # on a busy machine waiting for a second one takes 20 times as long as a batch_norm
        try:
            yield
        finally:
            CALLERS_DEVICE.reset(token)


def prepare(fn: Any, inputs: Sequence[Any], reference: Any, wrt: Any, name: str | None) -> Subject:
    """A subject, made without the warnings of the function."""
    before = settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = make_subject(fn, inputs, reference, wrt, name)
    return replace(subject, disturbed=tuple(restore(before)))
