"""Nothing of the caller's changes by a check, and what cannot be checked is refused in one sentence."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchcalc.testing import check_function, check_loss, check_optimizer
from torchcalc.testing.settings import generators, settings

FEW = ["gradient", "layouts", "determinism", "kinks"]
SCALE, SEEN = torch.ones(3), [0]


def writes_globals(x: Tensor) -> Tensor:
    SCALE.add_(1)
    SEEN.append(len(SEEN))
    return x * 2


class Remembers(nn.Module):
    """Writes its buffers, its parameters' gradients, its hooks, its flags."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.calls, self.log = 0, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.norm.weight.grad = torch.ones(3)
        self.norm.register_forward_hook(lambda *_: None)
        self.norm.running_mean.data.add_(1)  # type: ignore[operator, union-attr]
        return self.norm(x)


def module_state(module: nn.Module) -> Any:
    parts = [
        (m.training, dict(m._forward_hooks), dict(m._backward_hooks), dict(m._forward_pre_hooks))
        for m in module.modules()
    ]
    tensors = [*module.parameters(), *module.buffers()]
    grads = [None if p.grad is None else p.grad.tolist() for p in module.parameters()]
    return parts, [t.tolist() for t in tensors], grads, [t.requires_grad for t in tensors]


@pytest.mark.parametrize("include", [FEW, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm1d(3), Remembers, lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))]
)
def test_a_module_is_as_it_was(make: Any, include: Any) -> None:
    module = make()
    for p in module.parameters():
        p.grad = torch.full_like(p, 0.5)
    before = module_state(module)
    other = {k: v for k, v in vars(module).items() if not k.startswith("_")}
    check_function(module, torch.randn(5, 3), include=include, progress=False)
    assert module_state(module) == before
    assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == other


def test_closures_globals_partials_and_methods_are_as_they_were() -> None:
    held, log, count = torch.ones(3), [], 0

    def closes(x: Tensor, scale: Tensor = held) -> Tensor:
        nonlocal count
        count += 1
        log.append(count)
        held.mul_(2)
        return x * 3

    class Holder:
        def __init__(self) -> None:
            self.total, self.calls = torch.zeros(3), 0

        def call(self, x: Tensor) -> Tensor:
            self.total += x.detach().sum()
            self.calls += 1
            return x.sin()

    holder, x = Holder(), torch.rand(2, 3)
    for fn in (
        closes,
        writes_globals,
        holder.call,
        functools.partial(lambda k, y: y * k.add_(1).mean(), torch.ones(2)),
    ):
        check_function(fn, x, include=FEW, progress=False)
    assert (held.tolist(), log, count) == ([1, 1, 1], [], 0)
    assert (SCALE.tolist(), SEEN) == ([1, 1, 1], [0])
    assert (holder.total.tolist(), holder.calls) == ([0, 0, 0], 0)


def test_inputs_and_their_gradients_are_as_they_were() -> None:
    x = torch.rand(2, 3, requires_grad=True)
    x.grad = torch.ones(2, 3)
    values = x.tolist()
    check_function(lambda y, rest: y.mul(2) + rest[0].add_(1), x, [torch.zeros(3)], include=FEW, progress=False)
    assert x.tolist() == values
    assert x.grad.tolist() == torch.ones(2, 3).tolist()


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before.pop("torch's"), after.pop("torch's"))
    assert before == after


def test_generators_and_flags_are_as_they_were() -> None:
    def rude(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        torch.set_default_dtype(torch.float64)
        return x * 2

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return rude(x - y).abs().mean()

    x, y = torch.rand(2, 3)
    flags, states = settings(), generators()
    check_function(rude, x, include=FEW, progress=False)
    check_loss(loss, x, y, include=["gradient"], progress=False)
    assert settings() == flags
    assert_same(states, generators())


def test_what_an_optimizers_factory_holds_is_as_it_was() -> None:
    model, ema = nn.Linear(2, 2), torch.zeros(3)
    weights = model.weight.tolist()

    def factory(params: Any) -> torch.optim.Optimizer:
        ema.add_(1)
        with torch.no_grad():
            model.weight.add_(1)
        return torch.optim.SGD(params, lr=0.1)

    check_optimizer(factory, include=["groups"], progress=False)
    assert ema.tolist() == [0, 0, 0]
    assert model.weight.tolist() == weights


COO = torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), torch.ones(2), (2, 2), check_invariants=True)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (COO, r"input 0 is sparse \(sparse_coo\).*a function of its values"),
        (torch.randn(3, device="meta"), "input 0 is on the device meta and has no values"),
    ],
    ids=["sparse", "meta"],
)
def test_inputs_without_dense_values_are_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_function(torch.sin, x)


def test_sparse_gradients_are_served() -> None:
    index, places = torch.tensor([1, 2, 2, 0]), COO.coalesce().indices()

    def scattered(values: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(places, values, (2, 2), check_invariants=False).to_dense().sum(0)

    def looked_up(table: Tensor) -> Tensor:
        return nn.functional.embedding(index, table, sparse=True)

    for fn, x in ((looked_up, torch.randn(4, 3)), (scattered, torch.randn(2))):
        report = check_function(fn, x, include=["gradient", "determinism", "func.grad"], progress=False)
        assert report, str(report)


@pytest.mark.parametrize("error", [AssertionError, TypeError, IndexError, ValueError])
def test_a_refusal_of_any_kind_is_a_refusal(error: type[Exception]) -> None:
    def only_matrices(x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[0] != 4:
            raise error("give 4 rows")
        return x.exp().cumsum(0)

    report = check_function(only_matrices, torch.rand(4, 3), progress=False)
    assert report, str(report)


def test_a_modules_own_parameters_are_not_tried_in_other_shapes() -> None:
    class Watches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            if self.weight.shape != (3, 3):
                pytest.fail(f"tried with a weight of {tuple(self.weight.shape)}")  # no Exception: no check catches it
            return x * self.weight

    check_function(Watches(), torch.rand(3, 3), exclude=["vmap"], progress=False)


@pytest.mark.parametrize("kind", ["function", "loss"])
def test_a_default_device_reaches_the_function_but_not_the_checks(kind: str) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        if torch.zeros(1).device.type != "meta":
            pytest.fail("a call under another default device")  # no Exception: no check catches it
        return (x - y).square().mean()

    inputs = torch.rand(4, device="cpu"), torch.rand(4, device="cpu")
    torch.set_default_device("meta")
    try:
        report = (check_loss if kind == "loss" else check_function)(fn, *inputs, progress=False)
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)  # "cpu" would leave a mode, which changes what torch's own functions check
    assert report, str(report)
