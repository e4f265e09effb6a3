"""differentiable=True: a derivative through training steps, proven by gradcheck; and the step itself is the loop's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.optim.cases import CASES, Case, build, each_config, gradients, has_tensors, parameters, run, same
from torchcalc import optim as ours

CASES_D = tuple(case for case in CASES if case.takes("differentiable"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@each_config(CASES_D)
def test_equals_the_loop_to_the_last_bit(case: Case, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Also in float64, where stock torch is off by 1.7e-7: its bias correction comes from a float32 step (defect 6)."""
    if has_tensors(config) and dtype == torch.complex64:
        return
    params, loop = parameters(dtype), parameters(dtype)
    recorded = [p.detach().clone() for p in params]
    grads = gradients(params, 12)
    run(build(case.cls, loop, config, foreach=False), grads)
    optimizer = build(case.cls, recorded, config, differentiable=True)
    run(optimizer, grads)
    same(recorded, [p.detach() for p in loop])


def train(case: Any, start: Tensor, grads: list[Tensor], hyper: dict[str, Any]) -> Tensor:
    """The weight after a few recorded steps, as a function of all that it depends on."""
    p = start.clone()
    optimizer = case([p], differentiable=True, **hyper)
    for g in grads:
        p.grad = g
        optimizer.step()
    return p


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).squeeze().requires_grad_()


START = (0.3, -1.2, 2.0)
GRADS = ((0.5, -0.4, 1.5), (-0.7, 0.3, 0.9), (0.2, 0.8, -1.1))

#: (optimizer, fixed hyperparameters, hyperparameters to differentiate by, where torch supports them)
DERIVATIVES: list[tuple[Any, dict[str, Any], dict[str, tuple[float, ...]]]] = [
    (ours.SGD, {}, dict(lr=(0.1,))),
    (ours.SGD, dict(momentum=0.9, dampening=0.2), dict(lr=(0.1,), weight_decay=(0.2,))),
    (ours.SGD, dict(momentum=0.9, nesterov=True, maximize=True), dict(lr=(0.1,), weight_decay=(0.2,))),
    (ours.Adam, dict(weight_decay=0.1), dict(lr=(0.1,))),
    (ours.Adam, {}, dict(lr=(0.1,), betas=(0.7, 0.8), weight_decay=(0.2,))),
    (ours.Adam, dict(amsgrad=True, maximize=True), dict(lr=(0.1,), betas=(0.7, 0.8))),
    (ours.AdamW, {}, dict(lr=(0.1,), betas=(0.7, 0.8), weight_decay=(0.2,))),
    (ours.AdamW, dict(amsgrad=True), dict(lr=(0.1,))),
    (ours.RMSprop, dict(weight_decay=0.1), dict(lr=(0.1,))),
    (ours.RMSprop, dict(centered=True, momentum=0.9), dict(lr=(0.1,))),
    (ours.Adagrad, dict(lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1), dict(lr=(0.1,))),
    (ours.NAdam, dict(weight_decay=0.1), dict(lr=(0.1,))),
    (ours.NAdam, dict(decoupled_weight_decay=True, weight_decay=0.1), dict(lr=(0.1,))),
    (ours.RAdam, dict(betas=(0.5, 0.999), weight_decay=0.1), dict(lr=(0.1,))),
    (ours.Adamax, dict(weight_decay=0.1), dict(lr=(0.1,))),
    (ours.Adadelta, dict(weight_decay=0.1, eps=0.1), dict(lr=(0.1,))),
    (ours.ASGD, dict(lambd=0.1, t0=1, weight_decay=0.1), dict(lr=(0.1,))),
    (ours.Lion, dict(weight_decay=0.1), dict(lr=(0.1,))),
]


@pytest.mark.parametrize(
    ("cls", "fixed", "learnt"), DERIVATIVES, ids=lambda x: getattr(x, "__name__", None) or "-".join(x) or "plain"
)
def test_gradcheck(cls: Any, fixed: dict[str, Any], learnt: dict[str, tuple[float, ...]]) -> None:
    """With respect to the weight, every step's gradient, and the hyperparameters that may be tensors."""
    names = list(learnt)
    hypers = [leaf(value) for name in names for value in learnt[name]]

    def f(start: Tensor, g0: Tensor, g1: Tensor, g2: Tensor, *values: Tensor) -> Tensor:
        rest, hyper = list(values), dict(fixed)
        for name in names:
            taken = [rest.pop(0) for _ in learnt[name]]
            hyper[name] = tuple(taken) if name == "betas" else taken[0]
        return train(cls, start, [g0, g1, g2], hyper)

    assert gradcheck(f, (leaf(*START), *(leaf(*g) for g in GRADS), *hypers))


@pytest.mark.parametrize("case", CASES_D, ids=lambda case: case.name)
def test_gradcheck_by_the_state_that_was_loaded(case: Case) -> None:
    """Every number of the state is part of the graph: slots, NAdam's mu_product, the step count."""
    config = {**case.configs[-1], "lr": 0.01, **({"momentum": 0.9} if case.cls is ours.SGD else {})}
    config = {key: value for key, value in config.items() if not has_tensors({key: value})}
    if case.cls is ours.Adadelta:
        config["eps"] = 0.1  # beside 1e-6 gradcheck's difference of 1e-6 is no small one
    warm = leaf(*START).detach()
    source = build(case.cls, [warm], config)
    for g in (*GRADS, GRADS[-1]):  # Rprop forgets a gradient whose sign has changed, and at 0 a sign has no derivative
        warm.grad = leaf(*g).detach()
        source.step()
    state = source.state_dict()["state"][0]
    names = list(state)

    def f(*values: Tensor) -> Tensor:
        p = warm.clone()
        optimizer = build(case.cls, [p], config, differentiable=True)
        saved = optimizer.state_dict()
        saved["state"] = {0: dict(zip(names, values, strict=True))}
        optimizer.load_state_dict(saved)
        for g in GRADS[:2]:
            p.grad = leaf(*g).detach()
            optimizer.step()
        return p

    assert gradcheck(f, [state[name].detach().double().requires_grad_() for name in names])


@pytest.mark.parametrize("b2", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("t", [0.0, 3.0, 9.0])
def test_radams_derivative_by_the_step_count_is_finite(t: float, b2: float) -> None:
    """On both sides of ρₜ = 5, and where ρ∞ is below 4: what is not chosen adds 0 to the derivative, and no 0·∞."""

    def f(t: Tensor) -> Tensor:
        p = leaf(*START).detach()
        optimizer = ours.RAdam([p], lr=0.1, betas=(0.7, b2), differentiable=True)
        saved = optimizer.state_dict()
        slots = {"exp_avg": torch.full_like(p, 0.1), "exp_avg_sq": torch.full_like(p, 0.2)}
        saved["state"] = {0: {"step": t, **slots}}
        optimizer.load_state_dict(saved)
        for g in GRADS[:2]:
            p.grad = leaf(*g).detach()
            optimizer.step()
        return p

    assert gradcheck(f, [leaf(t)])


def test_learning_rate_by_its_own_derivative() -> None:
    """d/dlr of the loss after two steps on x²: x → x(1 − 2lr)², so the derivative is 2·x(1−2lr)²·2x(1−2lr)(−2)."""
    lr = leaf(0.1)
    x = torch.tensor(3.0, dtype=torch.float64)
    p = x.clone().requires_grad_()
    w = p.clone()
    optimizer = ours.SGD([w], lr=lr, differentiable=True)
    for _ in range(2):
        w.grad = 2 * w.clone()
        optimizer.step()
    (w**2).sum().backward()
    r = 1 - 2 * 0.1
    assert lr.grad is not None
    assert p.grad is not None
    torch.testing.assert_close(lr.grad, torch.tensor(2 * 3 * r**2 * 3 * 2 * r * -2, dtype=torch.float64))
    torch.testing.assert_close(p.grad, torch.tensor(2 * 3 * r**4, dtype=torch.float64))


def test_several_optimizers_share_one_learning_rate_that_is_learnt() -> None:
    """A tensor lr that requires a gradient is not copied, in no group: all groups' derivatives meet in it."""
    lr = leaf(0.1)
    a, b = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    optimizer = ours.SGD([{"params": [a]}, {"params": [b]}], lr=lr, differentiable=True)
    a.grad, b.grad = torch.ones_like(a), 2 * torch.ones_like(b)
    optimizer.step()
    (a + b).sum().backward()
    assert lr.grad is not None
    assert lr.grad.item() == -3.0


@pytest.mark.parametrize("way", [lambda p: p.step])
def test_leaves_are_refused_as_torch_refuses_them(way: Callable[..., Any]) -> None:
    for cls in (torch.optim.SGD, ours.SGD):
        p = torch.ones(1, requires_grad=True)
        optimizer = cls([p], lr=0.1, differentiable=True)
        p.grad = torch.ones(1)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            optimizer.step()
        assert p.item() == 1.0
