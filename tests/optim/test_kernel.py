"""Kernels that are made from rules: the same step as the rule's, and none where the rule is not the one recorded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import torchcalc.optim as ours
from tests.native.common import exact
from tests.native.reference import exact_sqrt
from tests.optim.cases import (
    TWINS,
    Case,
    build,
    each_config,
    gradients,
    has_tensors,
    parameters,
    run,
    same,
    set_gradients,
)  # fmt: skip
from torchcalc import native
from torchcalc.native.optim import UNSUPPORTED
from torchcalc.optim import kernel
from torchcalc.optim.tensor_list import add_scaled_

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

SHAPES = ((3, 4), (5,), (), (0, 2), (2, 3, 2, 3), (1001,))  # the last has blocks of half numbers, and an odd end
LONG = (*SHAPES, (70_001,))  # for more than one thread
FULL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)


def generated(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The class without a kernel written by hand."""
    return type(cls.__name__, (cls,), {"native": None})


class Spy:
    """Counts steps that a kernel made from a rule has done, and those that it has left to the rule."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = self.refused = 0
        step = kernel.step

        def counted(*args: Any) -> Any:
            result = step(*args)
            self.refused += result[0] == UNSUPPORTED
            self.done += result[0] != UNSUPPORTED
            return result

        monkeypatch.setattr(kernel, "step", counted)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.fixture
def exact_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's square roots, rounded correctly as the processor's are."""
    monkeypatch.setattr(Tensor, "sqrt", exact_sqrt)
    monkeypatch.setattr(Tensor, "sqrt_", lambda x: x.copy_(exact_sqrt(x)))


@pytest.mark.parametrize("dtype", FULL, ids=str)
@each_config(TWINS, keep=lambda config: not has_tensors(config))
def test_kernel_equals_torchs_loop_bit_for_bit(
    case: Case, config: dict[str, Any], dtype: torch.dtype, spy: Spy, exact_roots: None
) -> None:
    """As the kernels written by hand are; parameters with missing and late gradients among them."""
    assert case.twin is not None
    mine, theirs = parameters(dtype, shapes=LONG), parameters(dtype, shapes=LONG)
    a, b = build(generated(case.cls), mine, config), build(case.twin, theirs, config, foreach=False)
    grads = gradients(mine, 12)
    run(a, grads)
    run(b, grads)
    assert spy.done >= 10
    if exact():
        same([mine, a.state_dict()["state"]], [theirs, b.state_dict()["state"]])
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


@each_config(keep=lambda config: not has_tensors(config))
def test_each_variant_has_a_kernel(case: Case, config: dict[str, Any], spy: Spy) -> None:
    params = parameters()
    run(build(generated(case.cls), params, config), gradients(params, 3, missing=False))
    assert (spy.done, spy.refused) == (3, 0)


@pytest.mark.parametrize("state", ["same", "float32"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@each_config(keep=lambda config: not has_tensors(config))
def test_halves_are_computed_in_float32_and_rounded_once(
    case: Case, config: dict[str, Any], dtype: torch.dtype, state: str, spy: Spy
) -> None:
    params = parameters(dtype, shapes=SHAPES)
    optimizer = build(generated(case.cls), params, config)
    grads = gradients(params, 3, missing=False)
    run(optimizer, grads[:1])
    if state == "float32":
        for slots in optimizer.state.values():
            for key, x in slots.items():
                slots[key] = x.float()
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    twin = build(generated(case.cls), wide, config)
    for p, w in zip(params, wide, strict=True):
        twin.state[w] = {key: copy.deepcopy(x).float() for key, x in optimizer.state[p].items()}
    set_to = [[g.float() for g in step if g is not None] for step in grads[1:2]]
    run(optimizer, grads[1:2])
    run(twin, set_to)
    assert spy.refused == 0
    same(params, [w.detach().to(dtype) for w in wide])
    for p, w in zip(params, wide, strict=True):
        for key, x in optimizer.state[p].items():
            same(x, twin.state[w][key].to(x.dtype))


def test_hand_written_kernels_are_the_generated_ones() -> None:
    for cls, options in (
        (ours.Adam, dict(weight_decay=0.1, amsgrad=True)),
        (ours.AdamW, dict(betas=(0.3, 0.9))),
        (ours.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
        (ours.SGD, {}),
    ):
        for dtype in FULL:
            ends = []
            for each in (cls, generated(cls)):
                params = parameters(dtype, shapes=SHAPES)
                optimizer = build(each, params, options)
                run(optimizer, gradients(params, 5))
                ends.append((params, optimizer.state_dict()))
            same(*ends)


@pytest.mark.parametrize("dtype", [*FULL, *HALF], ids=str)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_centered_rmsprop_survives_a_constant_gradient(foreach: bool | None, dtype: torch.dtype) -> None:
    """v − m² is 0 in the limit, and rounds below it: torch's weights are NaN after some 130 steps in float32."""
    p = torch.nn.Parameter(torch.ones(40, dtype=dtype))
    optimizer = ours.RMSprop([p], centered=True, eps=1e-3, foreach=foreach)
    for _ in range(400):
        p.grad = torch.linspace(0.1, 4, 40).to(dtype)
        optimizer.step()
    assert p.isfinite().all()


# An optimizer of one's own.


def signed(p: Any, g: Any, *, lr: float, weight_decay: float) -> None:
    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)
    add_scaled_(p, g.sign(), -lr)


class Mine(ours.GradientDescent):
    rule = staticmethod(signed)

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"lr": group["lr"], "weight_decay": 0.5}


def test_a_rule_of_ones_own_runs_itself(spy: Spy) -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = Mine([p], lr=0.5)
    for _ in range(3):
        p.grad = torch.tensor([7.0, -7.0])
        optimizer.step()
    assert p.tolist() == [-0.3125, 0.3125]
    assert spy.done == 0
    assert spy.refused == 1  # it is not asked again


def test_a_rule_that_was_edited_runs_itself(monkeypatch: pytest.MonkeyPatch, spy: Spy) -> None:
    def reversed_lion(p: Any, g: Any, m: Any, *, lr: float, b1: float, b2: float, weight_decay: float) -> None:
        p.add_(g, alpha=lr)

    p = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(ours.Lion, "rule", staticmethod(reversed_lion))
    optimizer = ours.Lion([p], lr=0.5)
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == 0.5
    assert spy.done == 0


def test_numbers_that_differ_between_parameters_survive_a_refusal(spy: Spy) -> None:
    """advance has counted when the kernel refuses: the rule goes on with what it returned."""
    ends = []
    for cls in (ours.NAdam, torch.optim.NAdam):
        params = parameters(shapes=((3, 4), (4,)))
        optimizer = cls(params)
        for step, grads in enumerate(gradients(params, 4, missing=False)):
            if step == 2:
                set_gradients(params, grads)
                params[0].grad = params[0].detach()  # memory that is written, where only the kernel looks
                optimizer.step()
            else:
                run(optimizer, [grads])
        ends.append((params, [optimizer.state[p]["step"] for p in params]))
    assert spy.refused >= 1
    torch.testing.assert_close(ends[0], ends[1])


def test_stochastic_rounding_and_scaling_reach_the_kernel(spy: Spy) -> None:
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = generated(ours.AdamW)([p], lr=1e-3, weight_decay=0.0, rounding="stochastic", max_norm=1.0)  # type: ignore[call-arg]
    torch.manual_seed(0)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert spy.refused == 0
    assert abs(p.detach().double().mean().item() - 0.95) < 2e-3  # to the nearest it would stay at 1
