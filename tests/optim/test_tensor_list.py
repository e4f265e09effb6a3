"""The algebra of rules: on a list, and recorded, every operation is Tensor's own, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.optim.cases import same
from torchcalc.optim.tensor_list import (
    Recorded,
    TensorList,
    add_product_,
    add_ratio_,
    add_scaled,
    add_scaled_,
    as_real,
    average_,
)

# Each is a function of three vectors, spelled once; it runs on tensors, on a TensorList and on Recorded tensors.
IN_PLACE: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add_ number": lambda x, y, z: x.add_(0.25),
    "add_": lambda x, y, z: x.add_(y),
    "add_ alpha": lambda x, y, z: x.add_(y, alpha=-0.3),
    "mul_ number": lambda x, y, z: x.mul_(0.9),
    "mul_": lambda x, y, z: x.mul_(y),
    "div_ number": lambda x, y, z: x.div_(0.9),
    "div_": lambda x, y, z: x.div_(y),
    "sqrt_": lambda x, y, z: x.sqrt_(),
    "sign_": lambda x, y, z: x.sign_(),
    "copy_": lambda x, y, z: x.copy_(y),
    "clamp_min_": lambda x, y, z: x.clamp_min_(y),
    "lerp_": lambda x, y, z: x.lerp_(y, 0.1),
    "addcmul_": lambda x, y, z: x.addcmul_(y, z),
    "addcmul_ value": lambda x, y, z: x.addcmul_(y, z, value=-0.2),
    "addcdiv_": lambda x, y, z: x.addcdiv_(y, z),
    "addcdiv_ value": lambda x, y, z: x.addcdiv_(y, z, value=0.7),
    "chain": lambda x, y, z: x.mul_(0.5).add_(y).sqrt_().add_(1e-8),
    "add_scaled_": lambda x, y, z: add_scaled_(x, y, -0.3),
    "average_": lambda x, y, z: average_(x, y, 0.9),
    "add_product_": lambda x, y, z: add_product_(x, y, z, 0.1),
    "add_ratio_": lambda x, y, z: add_ratio_(x, y, z, -0.1),
}
NEW: dict[str, Callable[[Any, Any, Any], Any]] = {
    "clone": lambda x, y, z: x.clone(),
    "add": lambda x, y, z: x.add(y, alpha=2.0),
    "addcmul": lambda x, y, z: x.addcmul(y, z, value=-1),
    "mul": lambda x, y, z: x.mul(y),
    "mul number": lambda x, y, z: x.mul(3),
    "div": lambda x, y, z: x.div(y),
    "div number": lambda x, y, z: x.div(3),
    "sqrt": lambda x, y, z: x.sqrt(),
    "neg": lambda x, y, z: -x,
    "add_scaled": lambda x, y, z: add_scaled(x, y, 0.3),
}
SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)


def vectors(shapes: list[tuple[int, ...]], dtype: torch.dtype, count: int = 3) -> list[list[Tensor]]:
    """Positive, so that roots and quotients are finite."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.rand(s, generator=generator).add(0.1).to(dtype) for s in shapes] for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*IN_PLACE, *NEW])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(shapes=SHAPES)
def test_lists_and_recordings_do_what_tensors_do(name: str, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    function, in_place = {**IN_PLACE, **NEW}[name], name in IN_PLACE
    one, many, recorded = (vectors(shapes, dtype) for _ in range(3))
    expected = [function(*xyz) for xyz in zip(*one, strict=True)]

    lists = [TensorList(v) for v in many]
    result = function(*lists)
    assert (result is lists[0]) == in_place
    assert (result.device, result.dtype) == (expected[0].device, dtype)
    if dtype == torch.bfloat16 or name in ("average_", "lerp_"):  # a list may round once where a tensor rounds twice
        torch.testing.assert_close(result.tensors, expected, rtol=torch.finfo(dtype).eps * 2, atol=0)
    else:
        same(result.tensors, expected)
    for before, after in zip(many, lists, strict=True):  # in place: the very tensors
        assert all(a is b for a, b in zip(before, after.tensors, strict=True))
    same(many[1:], one[1:])

    for xyz, e in zip(zip(*recorded, strict=True), expected, strict=True):
        held = [Recorded(t) for t in xyz]
        old = [t.clone() for t in xyz]
        result = function(*held)
        assert (result is held[0]) == in_place
        same(result.tensor, e)
        same(list(xyz), old)  # nothing is overwritten


@pytest.mark.parametrize("name", [*IN_PLACE, *NEW])
def test_derivatives_flow_through_recordings(name: str) -> None:
    """In-place chains included: each needs values that the in-place form overwrites."""
    function = {**IN_PLACE, **NEW}[name]
    leaves = [v[0].requires_grad_() for v in vectors([(3,)], torch.float64)]

    def f(*xyz: Tensor) -> Tensor:
        result: Tensor = function(*(Recorded(t.clone()) for t in xyz)).add_(3).sqrt_().tensor
        return result

    assert torch.autograd.gradcheck(f, leaves)


LIVE: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "add_scaled_": lambda x, y, z, a: add_scaled_(x, y, a),
    "add_scaled": lambda x, y, z, a: add_scaled(x, y, a),
    "add_product_": lambda x, y, z, a: add_product_(x, y, z, a),
    "add_ratio_": lambda x, y, z, a: add_ratio_(x, y, z, a),
    "average_": lambda x, y, z, a: average_(x, y, a),
}


@pytest.mark.parametrize("name", LIVE)
def test_a_live_scalar_is_the_number_and_has_a_derivative(name: str) -> None:
    function = LIVE[name]
    x, y, z = (v[0] for v in vectors([(4,)], torch.float64))
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    number = function(x.clone(), y, z, 0.3)
    live = function(Recorded(x), Recorded(y), Recorded(z), a).tensor
    torch.testing.assert_close(live, number)
    derivative = torch.autograd.grad(live.sum(), a)[0]
    h = 1e-6
    up, down = (function(x.clone(), y, z, 0.3 + s).sum() for s in (h, -h))
    torch.testing.assert_close(derivative, (up - down) / (2 * h), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in LIVE if name != "average_"])
def test_one_live_scalar_for_each_tensor(name: str) -> None:
    shapes: list[tuple[int, ...]] = [(3,), (), (0,), (2, 2)]
    one, many = vectors(shapes, torch.float64), vectors(shapes, torch.float64)
    scalars = [torch.tensor(0.1 * (i + 1), dtype=torch.float64) for i in range(len(shapes))]
    expected = [LIVE[name](x, y, z, a.item()) for x, y, z, a in zip(*one, scalars, strict=True)]
    result = LIVE[name](*(TensorList(v) for v in many), TensorList(scalars))
    torch.testing.assert_close(result.tensors, expected)


def test_arithmetic_of_step_counts() -> None:
    """1 − βᵗ and its like, on lists of live counts."""
    t = TensorList([torch.tensor(1.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)])
    numbers = [1.0, 5.0]
    formulas: list[Callable[[Any], Any]] = [
        lambda t: 1 - 0.9**t,
        lambda t: (1 - 0.999**t) ** 0.5,
        lambda t: -(0.1 / (1 - 0.9**t)),
        lambda t: 0.1 / (1 + (t - 1) * 0.5),
        lambda t: -0.1 * (1.0 - t) / (1.0 - t * t * 3),
        lambda t: t * 2 + 1,
        lambda t: torch.tensor(0.9, dtype=torch.float64) ** t,
    ]
    for formula in formulas:
        torch.testing.assert_close([float(x) for x in formula(t).tensors], [float(formula(n)) for n in numbers])


def test_as_real() -> None:
    z = torch.tensor([1 + 2j])
    x = torch.ones(2)
    real, same_x, none = as_real(z, x, None)
    assert real.tolist() == [[1.0, 2.0]]
    assert same_x is x
    assert none is None
    real.mul_(2)
    assert z.item() == 2 + 4j  # a view
    (listed,) = as_real(TensorList([z, z]))
    assert [t.shape for t in listed.tensors] == [(1, 2)] * 2
    plain = TensorList([x])
    assert as_real(plain)[0] is plain
