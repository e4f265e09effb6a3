"""What is wrong only later, or for other sizes, is found; what is right but unusual has no errors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.testing.planted_over_time import OVER_TIME
from tests.testing.right_elementwise import SGLD, ScheduleFree
from tests.testing.right_optimizers import UNUSUAL
from torchcalc.testing import check_optimizer
from torchcalc.testing.settings import generators, left_alone, settings

FAST = ("a correction that stops at step 10", "nan after 500, seen by itself", "gradients below 1e-6 dropped", "nan_to_num",
        "lr floor", "zero gradients skip", "elements beyond 4,096", "p.grad kept as state", "unfreezing", "reseeds torch",
        "default dtype")  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=() if row[0] in FAST else pytest.mark.slow) for row in OVER_TIME],
    ids=[row[0].replace(" ", "_") for row in OVER_TIME],
)
def test_a_defect_that_shows_late_or_for_other_sizes_is_found(row: Any) -> None:
    _, cls, reference, options, check, verdict, cause = row
    finding = check_optimizer(cls, reference, options=options, include=[check], progress=False)[check]
    assert finding.verdict == verdict, finding
    assert cause in finding.cause


#: What no law finds without a reference: what is meant so cannot be told from a mistake.
NEEDS_REFERENCE = {"second moment capped"}


@pytest.mark.slow
@pytest.mark.parametrize("row", OVER_TIME, ids=[row[0].replace(" ", "_") for row in OVER_TIME])
def test_without_a_reference_it_is_noted(row: Any) -> None:
    name, cls, _, options, *_ = row
    include = ["long run", "steady", "gradient sizes", "lr sizes", "zero gradients", "nan gradients", "large tensors",
               "gradient memory", "unfreezing", "side effects", "changed lr", "mixed dtypes"]  # fmt: skip
    report = check_optimizer(cls, options=options, include=include, progress=False)
    assert report.errors or report.notes or name in NEEDS_REFERENCE, str(report)


QUICK = ("SGLD", "KeepsZeros", "ScheduleFree", "Made", "OnlyFloat32")


@pytest.mark.parametrize(
    ("cls", "options", "prepare"),
    [pytest.param(*row, marks=() if row[0].__name__ in QUICK else pytest.mark.slow) for row in UNUSUAL],
    ids=[row[0].__name__ for row in UNUSUAL],
)
def test_a_right_but_unusual_optimizer_has_no_errors(cls: Any, options: dict[str, Any], prepare: Any) -> None:
    report = check_optimizer(cls, options=options, prepare=prepare, progress=False)
    assert report, str(report)
    assert sum(f.verdict == "ok" for f in report) >= 10


def test_what_must_be_switched_on_says_so() -> None:
    with pytest.raises(ValueError, match=r"not in train mode.*pass prepare="):
        check_optimizer(ScheduleFree)


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before.pop("torch's"), after.pop("torch's"))
    assert before == after


def test_generators_and_flags_of_the_caller_are_left_alone() -> None:
    random.seed(5)
    np.random.seed(6)
    with left_alone():
        torch.set_default_dtype(torch.float64)
        flags, states = settings(), generators()
        for name in ("default dtype", "reseeds Python", "reseeds NumPy", "deterministic algorithms"):
            cls = next(row[1] for row in OVER_TIME if row[0] == name)
            check_optimizer(cls, include=["quadratic", "side effects", "groups"], progress=False)
        check_optimizer(SGLD, include=["determinism"], progress=False)
        assert settings() == flags
        assert_same(states, generators())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_does_not_reach_the_checks(device: str) -> None:
    torch.set_default_device(device)
    try:
        report = check_optimizer(torch.optim.SGD, options=dict(foreach=False), progress=False)
    finally:
        torch.set_default_device(None)  # "cpu" would leave a mode, which changes what torch's own functions check
    assert report, str(report)
