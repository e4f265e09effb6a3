"""Under autocast a weight is cast once, as torch casts it for its own operations."""

import gc
import weakref

import pytest
import torch
from torch.testing import assert_close

from torchcalc import casts
from torchcalc import functional as ours

F = torch.nn.functional


def weight():
    return torch.randn(5, 4, requires_grad=True)


def node_of(y, i=1):
    return y.grad_fn.next_functions[i][0]


def test_one_cast_for_all_uses_and_none_afterwards():
    w, x = weight(), torch.randn(3, 4)
    with torch.autocast("cpu"):
        ys = [ours.linear(x, w) for _ in range(3)]
        with torch.autocast("cpu"):
            ys.append(ours.linear(x, w))
        ys.append(ours.linear(x, w))
        (copy,) = (weakref.ref(copy) for _, _, copy in casts._casts().values())
    assert len({node_of(y) for y in ys}) == 1
    assert casts._casts() is None
    with torch.autocast("cpu"):
        assert node_of(ours.linear(x, w)) not in {node_of(y) for y in ys}
    grads = torch.autograd.grad(sum(y.sum() for y in ys), w)
    with torch.autocast("cpu"):
        expected = torch.autograd.grad(sum(F.linear(x, w).sum() for _ in range(5)), w)
    assert_close(grads, expected)
    del ys
    gc.collect()
    assert copy() is None


def test_what_is_cast_again():
    w, x = weight(), torch.randn(3, 4)
    with torch.autocast("cpu"):
        with torch.no_grad():
            ours.linear(x, w)
        first = ours.linear(x, w)  # not what no_grad has cast
        assert first.requires_grad
        with torch.no_grad():
            w.mul_(2)
        second = ours.linear(x, w)  # torch would take the old weight
        assert_close(second, 2 * first)
        torch.clear_autocast_cache()
        third = ours.linear(x, w)
        halves = {node_of(ours.linear(2 * x, 1 * w)) for _ in range(2)}  # no leaf
    assert len({node_of(y) for y in (first, second, third)}) == 3
    assert len(halves) == 2
    with torch.autocast("cpu", cache_enabled=False):
        assert node_of(ours.linear(x, w)) is not node_of(ours.linear(x, w))
    with torch.autocast("cpu", dtype=torch.float16):
        assert ours.linear(x, w).dtype == torch.float16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ours.linear(x, w).dtype == torch.bfloat16


@pytest.mark.parametrize("inside", [True, False])
def test_second_derivatives_go_through_the_cast(inside):
    def second(linear):
        torch.manual_seed(1)
        w, x = weight(), torch.randn(3, 4)
        with torch.autocast("cpu"):
            loss = (linear(linear(x, w), w.mT).float() ** 2).sum()
            if inside:
                (g,) = torch.autograd.grad(loss, w, create_graph=True)
        if not inside:
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
        return torch.autograd.grad(g.square().sum(), w)

    assert_close(second(ours.linear), second(F.linear), rtol=0.05, atol=0.05)


def test_transforms_cast_for_themselves():
    w, x = weight(), torch.randn(3, 4)
    with torch.autocast("cpu"):
        by_hand = torch.autograd.grad(ours.linear(x, w).sum(), w)
        assert_close(torch.func.grad(lambda w: ours.linear(x, w).sum())(w), by_hand[0])
        assert ours.linear(torch.ones(2, 4), w).dtype == torch.bfloat16
