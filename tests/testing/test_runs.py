"""Runs in a process of their own, time budgets, the progress bar, and the report on one screen."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from torchcalc.testing import Finding, Report, check_function, check_loss, check_optimizer
from torchcalc.testing.__main__ import main

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def aborts_if_strided(x: Tensor, y: Tensor | None = None) -> Tensor:
    if not x.is_contiguous():
        os.abort()
    return (x.sin() if y is None else (x.sin() - y).square().mean()) + 0


def exits_in_half(x: Tensor) -> Tensor:
    if x.dtype == torch.float16:
        os._exit(3)
    return x.cos()


def aborts(x: Tensor) -> Tensor:
    os.abort()


def slow(x: Tensor) -> Tensor:
    time.sleep(0.02)
    return x * 2


class AbortsWhenLarge(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        if any(p.numel() > 4096 for group in self.param_groups for p in group["params"]):
            os.abort()
        return super().step(closure)


ISOLATED: tuple[tuple[str, Any, str, str], ...] = (
    ("function", lambda **how: check_function(aborts_if_strided, X, **how), "layouts", "SIGABRT"),
    ("loss", lambda **how: check_loss(aborts_if_strided, X, X.cos(), **how), "layouts", "SIGABRT"),
    ("exit", lambda **how: check_function(exits_in_half, X, **how), "dtypes", "exits with status 3"),
    ("optimizer", lambda **how: check_optimizer(AbortsWhenLarge, **how), "large tensors", "SIGABRT"),
)


@pytest.mark.parametrize(("name", "run", "check", "cause"), ISOLATED, ids=[row[0] for row in ISOLATED])
def test_what_ends_the_process_is_a_finding_and_the_rest_is_checked(
    name: str, run: Any, check: str, cause: str
) -> None:
    include = {"optimizer": ["groups", "large tensors", "shapes"]}.get(
        name, ["gradient", "layouts", "dtypes", "determinism"]
    )
    report = run(include=include, isolate=True, progress=False)
    assert report[check].verdict == "error"
    assert cause in report[check].cause
    assert "exits" in cause or f"{__file__}:" in report[check].diagnosis  # the line that aborts
    assert sorted(f.check for f in report) == sorted(include)
    assert {f.check for f in report.errors} == {check}


def test_isolated_and_not_are_the_same_report() -> None:
    include = ["gradient", "kinks", "layouts", "forward mode"]
    reports = [
        check_function(torch.nn.functional.silu, X, include=include, isolate=i, progress=False) for i in (False, True)
    ]
    assert reports[0].json() == reports[1].json()


def test_what_making_the_subject_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="no example input is a float tensor"):
        check_function(torch.sin, torch.arange(3), isolate=True, progress=False)
    with pytest.raises(RuntimeError, match="SIGABRT while the subject is made"):
        check_function(aborts, X, isolate=True, progress=False)


@pytest.mark.parametrize("isolate", [False, True])
def test_what_a_budget_leaves_out_is_not_checked(isolate: bool) -> None:
    begin = time.monotonic()
    report = check_function(slow, X, seconds=0.5, isolate=isolate, progress=False)
    assert time.monotonic() - begin < 30
    left = [f for f in report if f.verdict == "not checked"]
    assert len(left) > 5
    assert {f.diagnosis for f in left} == {"left out: the time budget is used up"}
    assert "not checked: " in str(report)
    with pytest.raises(ValueError, match="seconds=0: give a time budget above zero"):
        check_function(slow, X, seconds=0)


def test_the_bar_shows_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    check_function(torch.sin, X, include=["gradient", "determinism"], seconds=100, progress=True)
    err = capsys.readouterr().err
    assert "sin [....................] 1/2 0 s of 100: gradient" in err
    assert "sin [##########..........] 2/2 0 s of 100: determinism" in err
    assert err.endswith("\r\033[K")


def test_the_command_line_runs_apart(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{__name__}:aborts_if_strided"
    assert main([name, "--include", "gradient,layouts", "--json"]) == 1
    found = {f["check"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert (found["gradient"]["verdict"], found["layouts"]["cause"]) == ("ok", "the process is ended by SIGABRT")
    assert main([f"{__name__}:aborts"]) == 2
    assert "the process is ended by SIGABRT when it is called" in capsys.readouterr().err
    assert main(["torch:sin", "--include", "gradient", "--no-isolate", "--seconds", "60"]) == 0
    assert "held: gradient" in capsys.readouterr().out


def test_the_report_says_what_is_wrong_first() -> None:
    report = Report(
        "f",
        (
            Finding("a"),
            Finding("b", "note", "weak", "it is weak\nand more"),
            Finding("i", "note", "weak", "it is weak\nand more"),
            Finding("c", "skipped", diagnosis="not here"),
            Finding("d", "error", "1", "word " * 200, "a cause"),
            Finding("e", "not checked", diagnosis="no time"),
            Finding("g", "not checked", diagnosis="no time"),
            Finding("h"),
        ),
    )
    lines = str(report).splitlines()
    assert lines[0] == "f: 1 error, 2 notes, 2 held, 2 not checked, 1 without application"
    assert lines[1] == "  ERROR  d: 1 [a cause]"
    assert lines[5].endswith(" ...")
    assert lines[6:] == [
        "  note   b, i: weak",
        "         it is weak",
        "  held: a, h",
        "  not checked: e, g: no time",
        "  does not apply: c: not here",
    ]
    assert max(map(len, lines)) <= 124


def test_a_fork_that_autograd_does_not_survive_is_refused(monkeypatch):
    def backward(self: Tensor) -> None:
        raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")

    monkeypatch.setattr(Tensor, "backward", backward)
    with pytest.raises(RuntimeError, match=r"isolate=True forks .* Unable to handle .*; pass isolate=False"):
        check_function(torch.sin, torch.linspace(-1, 1, 6), include=["gradient"], isolate=True, progress=False)
