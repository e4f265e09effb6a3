"""Is an optimizer right? One call, one report: the contract of ``torch.optim``, and the mathematics.

A *subject* is an optimizer class, or a factory ``params -> optimizer``, with options. Each check is one small function;
the files hold them by theme:

====================  ================================================================================================
``descent.py``        it descends: a quadratic, Rosenbrock, the stability threshold, steps in proportion to lr
``parity.py``         it is the rule it says: against a twin or a float64 textbook rule; ``textbook.py`` names slips
``longrun.py``          1,000 steps of a tiny problem; updates that change smoothly
``sizes.py``            gradients and lr of every size, zeros, nan
``large.py``            tensors beyond the sizes of blocks and counters
``conduct.py``          generators, flags, p.grad's memory, frozen parameters
``groups.py``         parameter groups, parameters without a gradient or with a late one, one that is not finite
``contract.py``       closures, hooks, gradients left alone, in-place updates
``schedules.py``      schedulers, a tensor lr, maximize
``arguments.py``      bad arguments are refused before anything is changed
``state.py``          state_dict, loading, pickling, copies: all continue to the last bit
``amp.py``            GradScaler, with inf at any step
``layouts.py``        memory formats, views and their neighbours, expanded gradients
``dtypes.py``         precisions, complex, sparse, empty and 0-d parameters, whether bfloat16 weights move
``implementations.py``  foreach, fused, differentiable and compiled steps equal the loop; determinism
====================  ================================================================================================

A wrong result is an error; a weakness that stock optimizers share (lr=inf accepted, a bf16 weight that stalls) is a
note; an option that the optimizer does not have is skipped. If the options say foreach or fused, that way is tested,
else every way that the constructor knows.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torchcalc.testing import registry
from torchcalc.testing.belongings import untouched

# Imported in the order of the report: importing registers the checks.
from torchcalc.testing.optimizers import (  # isort: skip  # noqa: F401
    descent,
    parity,
    longrun,
    sizes,
    large,
    conduct,
    groups,
    contract,
    schedules,
    arguments,
    state,
    amp,
    layouts,
    dtypes,
    implementations,
)
from torchcalc.testing.optimizers.noise import Silenced
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.report import Report
from torchcalc.testing.runs import Tell, play, run
from torchcalc.testing.settings import left_alone

__all__ = ["OptimizerSubject", "assert_optimizer", "check_optimizer", "pytest_optimizer"]


def check_optimizer(
    optimizer: Callable[..., torch.optim.Optimizer],
    reference: Callable[..., Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    threshold: float | None = None,
    prepare: Callable[[Any], Any] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    compile: bool = False,
    progress: bool | None = None,
    seconds: float | None = None,
    isolate: bool = False,
) -> Report:
    """Check an optimizer; takes a few seconds.

    Args:
        optimizer: an optimizer class, or a factory ``params -> optimizer``; a factory may take options by keyword.
        reference: what it should equal: another optimizer (a class, or a factory of one argument), or a rule
            ``rule(p, gradients, **hyper) -> p`` over a whole trajectory, given one float64 tensor, a list of them, and
            those of the optimizer's hyperparameters that it takes. Without it, there is no check of parity.
        options: constructor arguments under test.
        threshold: the largest lr·λ at which it converges on a quadratic of curvature λ (2 for gradient descent).
            Without it, it is derived for optimizers whose steps are linear in the gradient.
        prepare: what to call on the optimizer after it is made, such as ``lambda optimizer: optimizer.train()`` of a
            schedule-free one.
        include: run only checks of these names.
        exclude: leave out checks of these names.
        compile: also run the checks that compile.
        progress: show progress on stderr; None: if it is a terminal.
        seconds: the time budget; checks that would start later are "not checked".
        isolate: run in a process of its own, so that a kernel that aborts is a finding and not the end.

    Returns:
        A report, true when no check found an error.

    Raises:
        ValueError: the optimizer cannot be built, or there is no check of that name.
        RuntimeError: ``isolate`` where no process can be forked: on Windows, or after CUDA or a thread of autograd was used.

    >>> import torch
    >>> report = check_optimizer(torch.optim.SGD, options=dict(lr=0.1), include=["quadratic", "groups"])
    >>> bool(report), [finding.check for finding in report]
    (True, ['quadratic', 'groups'])
    """
    checks = registry.select(("optimizer",), include, exclude, slow=compile)
    fresh = _fresh(optimizer, reference, options, threshold, prepare)

    def job(checks: Sequence[registry.Check], tell: Tell, until: float) -> None:
        with untouched(optimizer, reference, prepare, options), _surroundings(fresh) as subject:
            play(subject.name, checks, fresh, tell, until)

    return run(job, checks, progress, seconds, isolate)


def assert_optimizer(
    optimizer: Callable[..., torch.optim.Optimizer],
    reference: Callable[..., Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    threshold: float | None = None,
    prepare: Callable[[Any], Any] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    compile: bool = False,
    progress: bool | None = None,
    seconds: float | None = None,
    isolate: bool = False,
) -> Report:
    """:func:`check_optimizer` that raises AssertionError, with the report as its message, if there are errors.

    Args:
        optimizer, reference, options, threshold, prepare, include, exclude, compile, progress, seconds, isolate: as for
            :func:`check_optimizer`.

    Raises:
        AssertionError: with the report as its message.

    >>> import torch
    >>> assert_optimizer(torch.optim.SGD, torch.optim.SGD, include=["parity"])["parity"].verdict
    'ok'
    """
    report = check_optimizer(
        optimizer,
        reference,
        options=options,
        threshold=threshold,
        prepare=prepare,
        include=include,
        exclude=exclude,
        compile=compile,
        progress=progress,
        seconds=seconds,
        isolate=isolate,
    )
    report.raise_errors()
    return report


def pytest_optimizer(
    optimizer: Callable[..., torch.optim.Optimizer],
    reference: Callable[..., Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    threshold: float | None = None,
    prepare: Callable[[Any], Any] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    compile: bool = False,
) -> Callable[..., None]:
    """A pytest test, parametrized by check: one line in a test file makes one test per check.

    A check that does not apply is a skipped test, with the reason.

    Args:
        optimizer, reference, options, threshold, prepare, include, exclude, compile: as for :func:`check_optimizer`.

    >>> import torch
    >>> test_my_optimizer = pytest_optimizer(torch.optim.SGD, options=dict(lr=0.1))
    """
    import pytest

    checks = registry.select(("optimizer",), include, exclude, slow=compile)
    fresh = _fresh(optimizer, reference, options, threshold, prepare)

    @pytest.mark.parametrize("check", checks, ids=[c.name.replace(" ", "_") for c in checks])
    def test_optimizer(check: registry.Check) -> None:
        with _surroundings(fresh) as subject:
            finding = registry.run_one(check, fresh)
        if finding.verdict in ("skipped", "not checked"):
            pytest.skip(finding.diagnosis)
        Report(subject.name, (finding,)).raise_errors()

    return test_optimizer


@contextlib.contextmanager
def _surroundings(fresh: Callable[[], OptimizerSubject]) -> Iterator[OptimizerSubject]:
    """The same random numbers every time, on the CPU, noise at its mean; afterwards everything is the caller's again."""
    with left_alone(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        with left_alone():
            subject = fresh()
            noise = Silenced() if subject.is_noisy else contextlib.nullcontext()
        with noise:
            yield subject


def _fresh(
    optimizer: Callable[..., torch.optim.Optimizer],
    reference: Callable[..., Any] | None,
    options: Mapping[str, Any] | None,
    threshold: float | None,
    prepare: Callable[[Any], Any] | None,
) -> Callable[[], OptimizerSubject]:
    """What makes the subject; a partial's keywords are options."""
    given = dict(options or {})
    while isinstance(optimizer, functools.partial) and not optimizer.args:
        given = {**optimizer.keywords, **given}
        optimizer = optimizer.func

    @functools.cache  # it holds nothing that a check changes, and what it finds out about itself serves all
    def subject() -> OptimizerSubject:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return OptimizerSubject(optimizer, given, reference, threshold, prepare)

    return subject
