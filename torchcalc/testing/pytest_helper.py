"""One line in a test file makes one test per check:  ``test_silu = pytest_function(silu, torch.randn(3, 4))``"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torchcalc.testing.belongings import untouched
from torchcalc.testing.functions import explained, prepare, surroundings
from torchcalc.testing.registry import Check, Kind, run_one, select
from torchcalc.testing.report import Report

__all__ = ["pytest_function", "pytest_loss"]

Test = Callable[[Check], None]


def pytest_function(
    fn: Callable[..., Any],
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    wrt: Sequence[int] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    compile: bool = False,
    name: str | None = None,
) -> Test:
    """A pytest test, parametrized by the checks of :func:`~torchcalc.testing.check_function`.

    Errors fail with the report, checks that do not apply are skipped with the reason, notes pass.

    Args:
        fn, *inputs, reference, wrt, include, exclude, compile, name: as for
            :func:`~torchcalc.testing.check_function`.

    >>> import torch
    >>> test_silu = pytest_function(torch.nn.functional.silu, torch.linspace(-2, 2, 5))
    """
    return _test(("function",), fn, inputs, reference, wrt, include, exclude, compile, name)


def pytest_loss(
    loss: Callable[..., Any],
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    wrt: Sequence[int] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    compile: bool = False,
    name: str | None = None,
) -> Test:
    """A pytest test, parametrized by the checks of :func:`~torchcalc.testing.check_loss`; see :func:`pytest_function`.

    Args:
        loss, *inputs, reference, wrt, include, exclude, compile, name: as for :func:`~torchcalc.testing.check_loss`.

    >>> import torch
    >>> test_mse = pytest_loss(torch.nn.MSELoss(), torch.rand(4, 3), torch.rand(4, 3))
    """
    return _test(("function", "loss"), loss, inputs, reference, wrt, include, exclude, compile, name)


def _test(
    kinds: tuple[Kind, ...], fn: Any, inputs: Sequence[Any], reference: Any, wrt: Any, include: Any, exclude: Any,
    compile: bool, name: str | None,
) -> Test:  # fmt: skip
    import pytest

    checks = select(kinds, include, exclude, compile)

    @pytest.mark.parametrize("check", checks, ids=[c.name.replace(" ", "_") for c in checks])
    def test(check: Check) -> None:
        with surroundings(inputs), untouched(fn, reference, inputs):
            subject = prepare(fn, inputs, reference, wrt, name)
            finding = explained(subject, run_one(check, subject.fresh))
        Report(subject.name, (finding,)).raise_errors()
        if finding.verdict in ("skipped", "not checked"):
            pytest.skip(finding.diagnosis)

    return test
