from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchcalc.functional as ours
from tests import checks
from tests.functions import LAYERS, table
from torchcalc.native import pointwise


@table("group_norm")
def test_group_norm(row, check):
    check(row)


@pytest.mark.parametrize("check", [checks.values, checks.first_derivatives, checks.autocast, checks.autocast_of_cuda])
def test_as_torch_where_that_is_right(check):
    row = next(row for row in LAYERS if row.name == "group_norm 2")
    check(replace(row, stock=lambda x, w, b: F.group_norm(x, 2, w, b, 1e-3), edges=row.edges[:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_side_by_side_far_from_zero(dtype):
    """torch 2.13 takes E[x²] - μ² there: in float32 its value is off by 0.7, its gradient of the weight by 8."""
    x = (torch.randn(2, 8, 16, 16) + (1000 if dtype == torch.float32 else 8)).to(dtype)
    g, w = torch.randn(2, 8, 16, 16).to(dtype), torch.randn(8).to(dtype)

    def found(x, w, g):
        leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = ours.group_norm(x if not leaves else leaves[0], 4, leaves[1])
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    right = found(x.double(), w.double(), g.double())
    last = x.to(memory_format=torch.channels_last)
    mine, apart = found(last, w, g), found(x, w, g)
    for a, c in (*zip(mine, right, strict=True), *zip(apart, right, strict=True)):
        error = (a.double() - c).abs().max() / c.abs().max()
        assert error < (1e-3 if dtype == torch.float32 else 2e-2)
    if pointwise.rows() is not None:
        assert all(map(torch.equal, mine, apart))
        assert all(a.is_contiguous(memory_format=torch.channels_last) for a in mine[:2])


def test_gradients_that_torch_refuses_or_crashes_at():
    """Of torch 2.13: a bias without a weight raises, and the weight's alone, of channels side by side, ends the process."""
    x = torch.randn(2, 4, 3, 3)
    ones, parameter = torch.ones(4), lambda: torch.linspace(1, 2, 4).requires_grad_()
    (alone,) = torch.autograd.grad(ours.group_norm(x, 2, None, b := parameter()).cos().sum(), b)
    (beside,) = torch.autograd.grad(ours.group_norm(x, 2, ones, b := parameter()).cos().sum(), b)
    assert_close(alone, beside)
    last = x.to(memory_format=torch.channels_last)
    of = [torch.autograd.grad(ours.group_norm(y, 2, w := parameter()).cos().sum(), w)[0] for y in (x, last)]
    assert_close(*of)
