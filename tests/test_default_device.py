"""A default device is the user's business: what is computed stays where its inputs are.

Under the default device "meta" a tensor that is made without a device has no numbers, and whatever it meets fails at once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchcalc.functional as ours
import torchcalc.optim
from tests import checks
from tests.functions import ROWS, Row
from tests.optim.cases import CASES, Case, build
from torchcalc.testing import assert_function, assert_optimizer


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_functions(row: Row) -> None:
    def derivatives() -> list[Any]:
        leaves = checks.fresh(inputs, row.grads)
        over = [leaves[i] for i in row.grads]
        y = row.ours(*leaves)
        first = torch.autograd.grad(y, over, checks.like_output(y), create_graph=True)
        curved = [g for g in first if g.requires_grad]
        second = torch.autograd.grad([g.square().sum() for g in curved], over, allow_unused=True) if curved else ()
        return [y.detach(), *(g.detach() for g in first), *(g for g in second if g is not None)]

    inputs = row.inputs()
    expected = derivatives()
    with torch.device("meta"):
        found = derivatives()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


ROWS_OF_OPTIMIZERS = [
    pytest.param(case, config, extras, id=f"{case.name}-{i}-{'-'.join(extras)}")
    for case in CASES
    for i, config in enumerate(case.configs)
    for extras in ({}, dict(max_norm=1.0), dict(rounding="stochastic"), dict(foreach=True), dict(foreach=False))
    if all(map(case.takes, extras)) and not (extras and i)
]


@pytest.mark.parametrize(("case", "config", "extras"), ROWS_OF_OPTIMIZERS)
def test_optimizers(case: Case, config: dict[str, Any], extras: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "rounding" in extras else torch.float32

    def steps(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,))]
        grads = [[torch.randn_like(p) for p in ps] for _ in range(3)]
        with torch.device(device):
            optimizer = build(case.cls, ps, config, **extras)
            for given in grads:
                for p, g in zip(ps, given, strict=True):
                    p.grad = g.clone()
                optimizer.step()
        return [p.detach() for p in ps]

    assert all(map(torch.equal, steps("meta"), steps("cpu")))


def test_check_function() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.device("meta"):
        assert_function(ours.gelu, x, reference=torch.nn.functional.gelu, progress=False)


def test_check_optimizer() -> None:
    with torch.device("meta"):
        assert_optimizer(torchcalc.optim.SGD, torch.optim.SGD, options=dict(lr=0.1, momentum=0.9), progress=False)
