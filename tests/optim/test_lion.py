"""Lion beside the table: what its paper says of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchcalc.optim import Lion


@pytest.mark.parametrize("foreach", [None, False, True])
def test_every_weight_moves_by_lr_whatever_its_gradient(foreach: bool | None) -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = Lion([p], lr=0.5, foreach=foreach)
    p.grad = torch.tensor([1e-30, -1e30, 3.0, 0.0])
    optimizer.step()
    assert p.tolist() == [-0.5, 0.5, -0.5, 0.0]


def test_the_sign_is_of_the_nearer_look_and_the_state_of_the_farther() -> None:
    """m = 1 and g = −5: with β₁ = 0.8 the look is 0.8 − 1 < 0, a step up; with β₁ = 0.9 it is 0.9 − 0.5 > 0, down."""
    for b1, direction in ((0.8, 1.0), (0.9, -1.0)):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = Lion([p], lr=1.0, betas=(b1, 0.5))
        optimizer.state[p]["exp_avg"] = torch.ones(1, dtype=torch.float64)
        p.grad = torch.full((1,), -5.0, dtype=torch.float64)
        optimizer.step()
        assert p.item() == direction
        assert optimizer.state[p]["exp_avg"].item() == 0.5 * 1 + 0.5 * -5


def test_complex_weights_are_pairs_of_real_ones() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    optimizer = Lion([p], lr=0.5)
    p.grad = torch.tensor([3 - 4j])
    optimizer.step()
    assert p.item() == -0.5 + 0.5j


def test_it_keeps_one_tensor_of_state() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = Lion([p])
    p.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.state[p]) == {"exp_avg"}
