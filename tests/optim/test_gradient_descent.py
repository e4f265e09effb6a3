"""Gradient descent: the textbook's trajectories, Armijo's test, and what a step leaves behind."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.optim.cases import parameters, same
from torchcalc.optim import SGD, GradientDescent


def closure_of(optimizer: Any, loss_of: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("lr", [0.1, 0.25, 0.5, 0.9, 1.0, 1.1])
def test_quadratic(lr: float) -> None:
    """On x² a step is x → (1 − 2lr)·x: it converges for lr < 1, jumps back and forth at 1, diverges above."""
    x = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    optimizer = GradientDescent([x], lr=lr)
    closure = closure_of(optimizer, lambda: x**2)
    for step in range(1, 8):
        before = x.item()
        loss = optimizer.step(closure)
        assert loss.item() == before**2
        assert math.isclose(x.item(), 3 * (1 - 2 * lr) ** step, rel_tol=1e-12, abs_tol=1e-15)
        assert optimizer.descent is not None
        assert (optimizer.descent.loss_before, optimizer.descent.trials, optimizer.descent.scale) == (before**2, 1, 1.0)
        assert math.isclose(optimizer.descent.loss_after, x.item() ** 2)
        if lr != 0.5:  # there one step arrives
            assert optimizer.descent.decreased == (lr < 1.0)


def test_two_dimensions_with_an_eigenvalue_each() -> None:
    """f = ½ Σ λᵢxᵢ²: every coordinate goes by its own factor 1 − lr·λᵢ."""
    eigenvalues = torch.tensor([1.0, 10.0], dtype=torch.float64)
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = GradientDescent([x], lr=0.15)
    for _ in range(5):
        optimizer.step(closure_of(optimizer, lambda: (eigenvalues * x**2).sum() / 2))
    torch.testing.assert_close(x.detach(), (1 - 0.15 * eigenvalues) ** 5)


@pytest.mark.parametrize("foreach", [None, False, True])
def test_without_a_closure_it_is_sgd(foreach: bool | None) -> None:
    params, others = parameters(), parameters()
    optimizer, sgd = GradientDescent(params, lr=0.1, foreach=foreach), SGD(others, lr=0.1, foreach=False)
    for p, q in zip(params, others, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    assert optimizer.step() is None
    sgd.step()
    same(params, others)
    assert optimizer.descent is None
    assert not optimizer.state_dict()["state"]


# Backtracking.


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shrink", [0.5, 0.1, 0.8])
@pytest.mark.parametrize("lr", [0.3, 1.0, 10.0, 1000.0])
def test_armijos_first_accepted_trial(lr: float, shrink: float, maximize: bool) -> None:
    """On x² Armijo's test (1 − 2s)² <= 1 − 4cs, s = scale·lr, is s <= 1 − c: the scale is the first power below."""
    c = 1e-2
    sign = -1 if maximize else 1
    x = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = GradientDescent([x], lr=lr, backtrack=True, shrink=shrink, armijo=c, max_trials=200, maximize=maximize)
    optimizer.step(closure_of(optimizer, lambda: sign * x**2))
    trials = next(k for k in range(200) if lr * shrink**k <= 1 - c) + 1
    found = optimizer.descent
    assert found is not None
    assert found.trials == trials
    assert math.isclose(found.scale, shrink ** (trials - 1), rel_tol=1e-12)
    assert math.isclose(x.item(), 2 * (1 - 2 * lr * found.scale), rel_tol=1e-12)
    assert sign * found.loss_after < sign * found.loss_before


def test_every_accepted_step_decreases_rosenbrock() -> None:
    x = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = GradientDescent([x], lr=1.0, backtrack=True)
    closure = closure_of(optimizer, lambda: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)
    losses = []
    for _ in range(60):
        losses.append(optimizer.step(closure).item())
        assert optimizer.descent is not None
        assert optimizer.descent.decreased
    assert all(b < a for a, b in pairwise(losses))
    assert losses[-1] < losses[0] / 5


def test_giving_up_puts_the_weights_back() -> None:
    """A closure whose gradient points uphill: no step along it decreases the loss."""
    params = parameters()
    start = copy.deepcopy(params)
    optimizer = GradientDescent(params, lr=1.0, backtrack=True, max_trials=5)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        for p in params:
            p.grad = -p.detach().clone()
        return sum(((p.detach() ** 2).sum() for p in params), torch.zeros(()))

    optimizer.step(closure)
    same(params, start)
    assert len(calls) == 1 + 5
    found = optimizer.descent
    assert found is not None
    assert (found.scale, found.trials, found.decreased) == (0.0, 5, False)
    assert found.loss_after == found.loss_before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_trial_that_is_not_finite_is_refused(bad: float) -> None:
    """√x of a negative number: too long a step leaves the domain."""
    x = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = GradientDescent([x], lr=8.0, backtrack=True)
    optimizer.step(closure_of(optimizer, lambda: x.sqrt() if x > 0 else x * bad))
    assert optimizer.descent is not None
    assert optimizer.descent.decreased
    assert 0 < x.item() < 1


def test_a_descent_to_nan_has_not_decreased() -> None:
    x = nn.Parameter(torch.tensor(1.0))
    optimizer = GradientDescent([x], lr=8.0)
    optimizer.step(closure_of(optimizer, lambda: x.sqrt()))
    assert optimizer.descent is not None
    assert math.isnan(optimizer.descent.loss_after)
    assert not optimizer.descent.decreased


def test_trials_see_the_same_dropout() -> None:
    """Otherwise another mask, and not the step, would decide; and a step moves the generator on by one evaluation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    x, y = torch.randn(16, 8), torch.randn(16, 1)
    optimizer = GradientDescent(net.parameters(), lr=64.0, backtrack=True)
    for _ in range(4):
        state = torch.get_rng_state()
        masks: list[Tensor] = []
        handle = net[1].register_forward_hook(lambda module, args, out, masks=masks: masks.append(out == 0))
        optimizer.step(closure_of(optimizer, lambda: nn.functional.mse_loss(net(x), y)))
        handle.remove()
        assert optimizer.descent is not None
        assert optimizer.descent.trials > 1
        assert optimizer.descent.decreased
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        drawn = torch.get_rng_state()
        torch.set_rng_state(state)
        nn.functional.dropout(torch.ones(16, 32), 0.5)
        assert torch.equal(drawn, torch.get_rng_state())


def test_trials_see_the_same_numbers_of_python_and_numpy() -> None:
    x = nn.Parameter(torch.tensor(1.0))
    optimizer = GradientDescent([x], lr=100.0, backtrack=True)
    draws: list[tuple[float, float]] = []

    def noisy() -> Tensor:
        draws.append((random.random(), np.random.random()))
        return x**2 + sum(draws[-1])

    optimizer.step(closure_of(optimizer, noisy))
    assert len(draws) > 2 and len(set(draws)) == 1
    assert (random.random(), np.random.random()) != draws[0]


@pytest.mark.parametrize("maximize", [False, True])
def test_a_decrease_that_rounding_hides(maximize: bool) -> None:
    """x² + 10⁴ in float32 around 0: the gradients tell how far to go, as on x² alone."""
    sign = -1 if maximize else 1
    steps = []
    for shift in (0.0, 1e4):
        x = nn.Parameter(torch.tensor(0.01))
        optimizer = GradientDescent([x], lr=3.0, backtrack=True, armijo=0.1, maximize=maximize)
        optimizer.step(closure_of(optimizer, lambda x=x, shift=shift: sign * (x**2 + shift)))
        assert optimizer.descent is not None
        steps.append((x.item(), optimizer.descent.scale, optimizer.descent.trials))
    assert steps[0] == steps[1]
    assert abs(steps[1][0]) < 0.01


def test_a_step_leaves_the_generator_where_one_evaluation_does() -> None:
    x = nn.Parameter(torch.tensor(1.0))
    optimizer = GradientDescent([x], lr=100.0, backtrack=True)
    draws: list[float] = []

    def noisy() -> Tensor:
        noise = torch.rand(())
        draws.append(noise.item())
        return x**2 + noise

    torch.manual_seed(3)
    first, second = torch.rand(2).tolist()
    torch.manual_seed(3)
    optimizer.step(closure_of(optimizer, noisy))
    assert len(draws) > 2
    assert set(draws) == {first}
    assert torch.rand(()).item() == second


# Groups and gradients.


def test_groups_with_their_own_lr() -> None:
    a, b, frozen = (nn.Parameter(torch.tensor(1.0, dtype=torch.float64)) for _ in range(3))
    optimizer = GradientDescent([{"params": [a, frozen]}, {"params": [b], "lr": 0.2}], lr=0.1, backtrack=True)
    optimizer.step(closure_of(optimizer, lambda: a**2 + b**2))
    torch.testing.assert_close([a.item(), b.item(), frozen.item()], [0.8, 0.6, 1.0])


def test_the_promise_counts_each_group_with_its_lr() -> None:
    """Armijo with c near 1 on a linear loss, which keeps its promise exactly: Σ lrᵢ·gᵢ² is accepted, more is not."""
    a, b = (nn.Parameter(torch.tensor(0.0, dtype=torch.float64)) for _ in range(2))
    optimizer = GradientDescent([{"params": [a], "lr": 0.25}, {"params": [b], "lr": 2.0}], backtrack=True, armijo=0.999)
    optimizer.step(closure_of(optimizer, lambda: 3 * a - 5 * b))
    assert optimizer.descent is not None
    assert optimizer.descent.scale == 1.0
    assert optimizer.descent.loss_after == -(0.25 * 9 + 2 * 25)


def test_complex_and_sparse_gradients() -> None:
    z = nn.Parameter(torch.tensor([1 + 2j, -1j], dtype=torch.complex128))
    optimizer = GradientDescent([z], lr=4.0, backtrack=True)
    optimizer.step(closure_of(optimizer, lambda: (z.abs() ** 2).sum()))
    assert optimizer.descent is not None
    assert optimizer.descent.decreased
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = GradientDescent(table.parameters(), lr=64.0, backtrack=True)
    untouched = table.weight.detach()[[1, 2, 4]].clone()
    optimizer.step(closure_of(optimizer, lambda: table(torch.tensor([0, 3, 3])).pow(2).sum()))
    assert optimizer.descent is not None
    assert optimizer.descent.decreased
    same(table.weight.detach()[[1, 2, 4]], untouched)


def test_the_closures_gradients_are_left_at_the_last_trial() -> None:
    x = nn.Parameter(torch.tensor(3.0))
    optimizer = GradientDescent([x], lr=0.25)
    optimizer.step(closure_of(optimizer, lambda: x**2))
    assert x.grad is not None
    assert x.grad.item() == 2 * x.item()


def test_an_exception_in_a_trial_puts_the_weights_back() -> None:
    x = nn.Parameter(torch.tensor(3.0))
    optimizer = GradientDescent([x], lr=1.0, backtrack=True)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        x.grad = torch.ones(())
        return x.detach()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert x.item() == 3.0


def test_backtrack_needs_one_direction() -> None:
    a, b = parameters()[:2]
    optimizer = GradientDescent([{"params": [a]}, {"params": [b], "maximize": True}], backtrack=True)
    with pytest.raises(ValueError, match="maximize differs between groups"):
        optimizer.step(closure_of(optimizer, lambda: a.sum() + b.sum()))


def test_backtrack_needs_a_closure() -> None:
    optimizer = GradientDescent(parameters(), backtrack=True)
    with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
        optimizer.step()


def test_a_number_as_loss_and_a_loss_of_one_element() -> None:
    x = nn.Parameter(torch.tensor([3.0]))
    optimizer = GradientDescent([x], lr=0.25)

    def closure() -> float:
        x.grad = 2 * x.detach()
        return x.item() ** 2

    assert optimizer.step(closure) == 9.0
    loss = optimizer.step(closure_of(optimizer, lambda: x**2))
    assert loss.item() == 2.25


def test_copies_keep_the_options() -> None:
    optimizer = GradientDescent(parameters(), lr=0.5, backtrack=True, shrink=0.25, armijo=0.5, max_trials=3)
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert (other.backtrack, other.shrink, other.armijo, other.max_trials) == (True, 0.25, 0.5, 3)
        assert other.descent is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_devices_generator_is_restored_too() -> None:
    x = nn.Parameter(torch.tensor(1.0, device="cuda"))
    optimizer = GradientDescent([x], lr=100.0, backtrack=True)
    draws: list[float] = []

    def noisy() -> Tensor:
        noise = torch.rand((), device="cuda")
        draws.append(noise.item())
        return x**2 + noise

    optimizer.step(closure_of(optimizer, noisy))
    assert len(draws) > 2
    assert len(set(draws)) == 1
