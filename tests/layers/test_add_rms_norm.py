import pytest
import torch
from torch.testing import assert_close

import torchcalc.functional as ours
from tests.functions import table


@table("add_rms_norm")
def test_add_rms_norm(row, check):
    check(row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_norm_of_the_sum_that_is_returned(dtype):
    x, a, w = (torch.randn(s).to(dtype) for s in ((40, 96), (40, 96), (96,)))
    y, s = ours.add_rms_norm(x, a, [96], w)
    assert torch.equal(s, x + a)
    assert torch.equal(y, ours.rms_norm(s, [96], w))


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_gradients_where_one_result_is_not_used(used):
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        x, a, w = (torch.randn(s, requires_grad=True) for s in ((5, 8), (5, 8), (8,)))
        s = x + a
        both = ours.add_rms_norm(x, a, [8], w) if fused else (ours.rms_norm(s, [8], w), s)
        loss = sum(both[i].square().sum() for i in used)
        results.append(torch.autograd.grad(loss, (x, a, w), allow_unused=True, materialize_grads=True))
    assert_close(*results)


def test_the_sum_goes_on_in_place_only_where_that_is_noticed():
    x, a = torch.randn(2, 5, 8, requires_grad=True)
    y, s = ours.add_rms_norm(x, a, [8])
    s += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
