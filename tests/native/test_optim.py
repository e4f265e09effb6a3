"""The optimizer kernels against torch.optim's loop (the same bits) and the textbook in float64, however they are run."""

import copy
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.native.common import (
    ADAM,
    ADAM_CASES,
    DTYPES,
    FULL,
    SGD,
    SGD_CASES,
    SIZES,
    AdamState,
    adam_,
    assert_near,
    clones,
    exact,
    named,
    same,
    sgd_,
)
from tests.native.reference import HALF, loop_sgd, textbook_adam, textbook_sgd, ulp
from torchcalc.native.optim import DONE, UNSUPPORTED, Bound, grad_norm

# --- the same bits as torch.optim's loop ------------------------------------------------------------------------------


@named(ADAM_CASES)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", FULL)
def test_adam_equals_the_loop(dtype: torch.dtype, amsgrad: bool, case: dict[str, Any]) -> None:
    ours = AdamState([(n,) for n in SIZES], dtype, amsgrad=amsgrad)
    loop = copy.deepcopy(ours)
    for _ in range(4):
        grads = ours.grads()
        kept = clones(grads)
        before = copy.deepcopy(ours)
        assert ours.step(grads, **case) == DONE
        loop.loop(grads, **case)
        assert same(grads, kept)
        if exact():
            assert same(ours.all(), loop.all())
        else:
            largest = [
                p.abs() + m.abs() + g.abs() for p, m, g in zip(before.params, before.exp_avgs, grads, strict=True)
            ]
            assert_near(ours.params, loop.params, largest)
            ours = copy.deepcopy(loop)  # rounding errors do not add up


@named(SGD_CASES)
@pytest.mark.parametrize("dtype", FULL)
def test_sgd_equals_the_loop(dtype: torch.dtype, case: dict[str, Any]) -> None:
    options = {**SGD, **case}
    params = [torch.randn(n, dtype=dtype) for n in SIZES]
    uninitialised = [torch.full_like(p, math.nan) for p in params] if options["momentum"] else []
    expected, buffers = clones(params), clones(uninitialised)
    for step in range(4):
        grads = [torch.randn_like(p) for p in params]
        kept = clones(grads)
        sizes = [p.abs() + g.abs() for p, g in zip(params, grads, strict=True)]
        if step > 0 and buffers:
            sizes = [s + b.abs() for s, b in zip(sizes, buffers, strict=True)]
        first = range(len(params)) if step == 0 and buffers else []
        assert sgd_(params, grads, uninitialised, first=first, **options) == DONE
        for i, g in enumerate(grads):
            loop_sgd(expected[i], g, buffers[i] if buffers else None, step == 0, **options)
        assert same(grads, kept)
        if exact():
            assert same(params + uninitialised, expected + buffers)
        else:
            assert_near(params, expected, sizes)
            params, uninitialised = clones(expected), clones(buffers)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@named(ADAM_CASES)
def test_adam_is_within_an_ulp_of_torch(optimizer: type[torch.optim.Optimizer], case: dict[str, Any]) -> None:
    # torch.sqrt differs from the rounded root by an ulp on some machines; nothing else does. The update is then off by less
    # than 4 of its own ulps, and the sum with the parameter is rounded to the nearest of the parameter's.
    options = {**ADAM, **case, "decoupled": optimizer is torch.optim.AdamW}
    state = AdamState([(20_000,)], torch.float32)
    p, m, v, t = state.params[0], state.exp_avgs[0], state.exp_avg_sqs[0], state.steps[0]
    q = torch.nn.Parameter(p.clone())
    stock = optimizer(
        [q], lr=options["lr"], betas=(options["beta1"], options["beta2"]), eps=options["eps"],
        weight_decay=options["weight_decay"], maximize=options.get("maximize", False), foreach=False,
    )  # fmt: skip
    stock.state[q] = dict(step=t.clone(), exp_avg=m.clone(), exp_avg_sq=v.clone())
    g = q.grad = torch.randn_like(p)
    old = p.clone()
    assert adam_([p], [g], [m], [v], [], [t], **options) == DONE
    stock.step()
    assert stock.state[q]["step"] == t
    if exact():
        assert same([stock.state[q]["exp_avg"], stock.state[q]["exp_avg_sq"]], [m, v])
    update = (p.double() - old.double()).abs()
    assert ((p.double() - q.detach().double()).abs() <= ulp(p, p.dtype) + 4 * torch.finfo(p.dtype).eps * update).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, 1e-40, 0.0, -0.0])
@pytest.mark.parametrize("place", ["grads", "params", "exp_avgs", "exp_avg_sqs", "maxima"])
def test_special_values_go_through(place: str, value: float) -> None:
    ours = AdamState([(40,)], torch.float32, amsgrad=True)
    grads = ours.grads()
    tensors = grads if place == "grads" else getattr(ours, place)
    tensors[0][::3] = abs(value) if place in ("exp_avg_sqs", "maxima") else value
    loop = copy.deepcopy(ours)
    assert ours.step(grads) == DONE
    loop.loop(grads)
    for a, b in zip(ours.all(), loop.all(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-45, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("state_dtype", ["same", "float32"])
def test_every_nan_stays_one(dtype: torch.dtype, state_dtype: str) -> None:
    # Rounding adds to the bits, which must not carry a payload of all ones into the sign.
    payloads = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -(2**22)], dtype=torch.int32).view(torch.float32)
    full = state_dtype == "float32"
    halves = payloads.to(dtype)
    assert halves.isnan().all()
    b = payloads.clone() if full else halves.clone()
    p = torch.ones(5, dtype=dtype)
    assert sgd_([p], [torch.ones_like(p)], [b], **{**SGD, "momentum": 0.9}) == DONE
    assert p.isnan().all() and b.isnan().all()
    (lr,) = struct.unpack("<d", b"\xff" * 8)
    for seed in (None, 1):
        p = torch.ones(5, dtype=dtype)
        assert sgd_([p], [p.clone()], [], **{**SGD, "lr": lr}, seed=seed) == DONE
        assert p.isnan().all()


# --- half types, and the textbook -------------------------------------------------------------------------------------

# A number computed in `dtype` with a few roundings, from terms of this total size, and stored in `stored`.
ROUNDINGS = 8


def assert_rounded(actual: Tensor, truth: Tensor, terms: Tensor, computed: torch.dtype) -> None:
    """Half an ulp where it is stored, and at most ROUNDINGS where it was computed."""
    slack = ROUNDINGS * torch.finfo(computed).eps * terms.double().abs()
    half = 0.5 * ulp(truth.abs() + slack, actual.dtype) if actual.dtype != computed else 0.0
    assert ((actual.double() - truth).abs() <= half + slack).all()


@named(ADAM_CASES)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("state_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_adam_follows_the_textbook(dtype: torch.dtype, state_dtype: str, amsgrad: bool, case: dict[str, Any]) -> None:
    options = {**ADAM, **case}
    ours = AdamState([(5000,)], dtype, amsgrad=amsgrad, state_dtype=dtype if state_dtype == "same" else torch.float32)
    old = copy.deepcopy(ours)
    grads = [torch.randn_like(ours.params[0])]
    assert ours.step(grads, **case) == DONE
    maximum = old.maxima[0] if amsgrad else None
    p, m, v, x = textbook_adam(old.params[0], grads[0], old.exp_avgs[0], old.exp_avg_sqs[0], maximum, 4.0, **options)
    size_g = grads[0].double().abs() + options["weight_decay"] * old.params[0].double().abs()
    size_m = old.exp_avgs[0].double().abs() + size_g
    assert_rounded(ours.exp_avgs[0], m, size_m, torch.float32)
    assert_rounded(ours.exp_avg_sqs[0], v, old.exp_avg_sqs[0].double() + size_g**2, torch.float32)
    if amsgrad:
        assert x is not None
        assert_rounded(ours.maxima[0], x, x + size_g**2, torch.float32)
    root = ((v if x is None else x) / (1 - options["beta2"] ** 4)).sqrt() + options["eps"]
    update = options["lr"] / (1 - options["beta1"] ** 4) * size_m / root
    assert_rounded(ours.params[0], p, old.params[0].double().abs() + 2 * update, torch.float32)


@named(SGD_CASES)
@pytest.mark.parametrize("state_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_sgd_follows_the_textbook(dtype: torch.dtype, state_dtype: str, case: dict[str, Any]) -> None:
    options = {**SGD, **case}
    p, g = torch.randn(5000, dtype=dtype), torch.randn(5000, dtype=dtype)
    b = torch.randn(5000, dtype=dtype if state_dtype == "same" else torch.float32) if options["momentum"] else None
    old_p, old_b = p.clone(), None if b is None else b.clone()
    assert sgd_([p], [g], [] if b is None else [b], **options) == DONE
    true_p, true_b = textbook_sgd(old_p, g, old_b, False, **options)
    size = old_p.double().abs() + g.double().abs() + (0 if old_b is None else old_b.double().abs())
    assert_rounded(p, true_p, size, torch.float32)
    if b is not None:
        assert true_b is not None
        assert_rounded(b, true_b, size, torch.float32)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_are_at_least_as_near_to_the_truth_as_torch(dtype: torch.dtype) -> None:
    ours = AdamState([(30_000,)], dtype)
    truth = copy.deepcopy(ours)
    p, m, v = truth.params[0].double(), truth.exp_avgs[0].double(), truth.exp_avg_sqs[0].double()
    rivals = []
    for implementation in (dict(foreach=False), dict(foreach=True), dict(fused=True)):
        q = torch.nn.Parameter(ours.params[0].clone())
        stock = torch.optim.AdamW([q], lr=0.01, weight_decay=0.1, **implementation)
        exp_avg, exp_avg_sq = ours.exp_avgs[0].clone(), ours.exp_avg_sqs[0].clone()
        stock.state[q] = dict(step=ours.steps[0].clone(), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        rivals.append((q, stock))
    for step in range(4, 24):
        g = torch.randn_like(ours.params[0])
        assert ours.step([g], lr=0.01, weight_decay=0.1) == DONE
        options = {**ADAM, "lr": 0.01, "weight_decay": 0.1}
        p, m, v, _ = textbook_adam(p, g, m, v, None, float(step), **options)
        for q, stock in rivals:
            q.grad = g.clone()
            stock.step()
    error = (ours.params[0].double() - p).square().mean()
    for q, _ in rivals:
        assert error <= (q.detach().double() - p).square().mean() * 1.001


# --- the same bits however it is run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_matter(dtype: torch.dtype, seed: int | None, threads: None) -> None:
    shapes = [(3,), (100, 333), (1,), (), (70_001,), (0,), (129,), (64, 65)]
    start = AdamState(shapes, dtype, amsgrad=True)
    grads = start.grads()
    buffers = [torch.randn_like(p) for p in start.params]
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        adam = copy.deepcopy(start)
        assert adam.step(grads, seed=seed) == DONE
        params, running = clones(start.params), clones(buffers)
        assert sgd_(params, grads, running, **{**SGD, "momentum": 0.9}, seed=seed) == DONE
        results.append(([*adam.all(), *params, *running], grad_norm(grads)))
    for tensors, norm in results[1:]:
        assert same(tensors, results[0][0])
        assert norm == results[0][1]


def test_bound_equals_unbound() -> None:
    unbound = AdamState([(33,), (4, 5), ()], torch.float32)
    held = copy.deepcopy(unbound)
    bound = held.bound()
    for _ in range(3):
        grads = unbound.grads()
        assert unbound.step(grads) == DONE
        assert bound.adam_(grads, **ADAM) == DONE
        assert same(unbound.all(), held.all())


def test_parameters_of_several_dtypes_in_one_call() -> None:
    mixed = [AdamState([(50,)], dtype) for dtype in DTYPES] + [
        AdamState([(50,)], dtype, state_dtype=torch.float32) for dtype in HALF
    ]
    alone = copy.deepcopy(mixed)
    grads = [s.grads()[0] for s in mixed]
    lists = [[getattr(s, name)[0] for s in mixed] for name in ("params", "exp_avgs", "exp_avg_sqs", "steps")]
    assert adam_(lists[0], grads, lists[1], lists[2], [], lists[3], **ADAM) == DONE
    for together, single, g in zip(mixed, alone, grads, strict=True):
        assert single.step([g]) == DONE
        assert same(together.all(), single.all())


def test_every_parameter_has_its_own_step() -> None:
    state = AdamState([(4,)] * 3, torch.float32)
    state.steps = [torch.tensor(0.0), torch.tensor(41.0, dtype=torch.float64), torch.tensor([7.0])]
    loop = copy.deepcopy(state)
    grads = state.grads()
    assert state.step(grads) == DONE
    loop.loop(grads)
    assert [t.item() for t in state.steps] == [1.0, 42.0, 8.0]
    torch.testing.assert_close(state.params, loop.params, rtol=1e-6, atol=0)


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "contiguous": lambda t: t,
    "size 1 with any stride": lambda t: t[:1].as_strided((1, *t.shape[1:]), (17, *t.stride()[1:])),
    "an offset into a storage": lambda t: torch.cat([t.new_zeros(5), t.flatten()])[5:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_dense_strides_run_as_they_lie(dtype: torch.dtype, layout: Any) -> None:
    start = AdamState([(4, 3, 5, 2)], dtype)
    g = torch.randn_like(start.params[0])
    expected = copy.deepcopy(start)
    parts = (start.params, start.exp_avgs, start.exp_avg_sqs)
    p, m, v = (layout(part[0].clone()) for part in parts)
    assert adam_([p], [layout(g)], [m], [v], [], start.steps, **ADAM) == DONE
    assert expected.step([g]) == DONE
    for actual, part in zip((p, m, v), (expected.params, expected.exp_avgs, expected.exp_avg_sqs), strict=True):
        assert torch.equal(actual, part[0][: len(actual)])


def test_lazy_gradients_mean_what_they_say() -> None:
    def step(p: Tensor, g: Tensor) -> int:
        return sgd_([p], [g], [], **{**SGD, "lr": 1.0})

    p = torch.zeros(4)
    assert step(p, torch._neg_view(torch.ones(4))) == DONE  # as the imaginary part of a conjugate
    assert torch.equal(p, torch.ones(4))
    assert step(p, torch._efficientzerotensor(4)) == UNSUPPORTED  # it has no memory
    assert torch.equal(p, torch.ones(4))
    assert grad_norm([torch._neg_view(torch.full((3,), 2.0))]) == (12.0, True)
    lazy = torch._neg_view(torch.ones(4))
    assert Bound([lazy], []).sgd_([torch.ones(4)], **SGD) == UNSUPPORTED
    assert torch.equal(lazy, -torch.ones(4))


# --- GradScaler, clipping, the norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [65536.0, 3.0, 0.7])
@pytest.mark.parametrize("dtype", FULL)
def test_unscaling_equals_the_grad_scaler(dtype: torch.dtype, scale: float) -> None:
    ours = AdamState([(1000,)], dtype)
    separate = copy.deepcopy(ours)
    grads = [g * scale for g in ours.grads()]
    unscaled = clones(grads)
    inverse = torch.tensor(scale).double().reciprocal().float()  # as in GradScaler.unscale_
    torch._amp_foreach_non_finite_check_and_unscale_(unscaled, torch.zeros(1), inverse)
    kept = clones(grads)
    assert ours.step(grads, grad_scale=torch.tensor(scale)) == DONE
    assert separate.step(unscaled) == DONE
    assert same(ours.all(), separate.all())
    assert same(grads, kept)


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("maximize", [False, True])
def test_grad_coef_equals_multiplying_first(dtype: torch.dtype, maximize: bool) -> None:
    ours = AdamState([(1000,)], dtype)
    separate = copy.deepcopy(ours)
    grads = ours.grads()
    assert ours.step(grads, grad_coef=0.3, maximize=maximize) == DONE
    assert separate.step([g * 0.3 for g in grads], maximize=maximize) == DONE
    assert same(ours.all(), separate.all())


@pytest.mark.parametrize(
    "scalar", [torch.tensor(1), torch.ones(2), torch.ones((), device="meta"), torch.ones(1).half()]
)
def test_refuses_other_scaler_tensors(scalar: Tensor) -> None:
    state = AdamState([(5,)], torch.float32)
    before = clones(state.all())
    assert state.step(state.grads(), grad_scale=scalar) == UNSUPPORTED
    assert same(state.all(), before)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_shapes_and_numbers(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(FULL), label="dtype")
    shapes = data.draw(st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), max_size=6), label="shapes")
    order = {shape: data.draw(st.permutations(range(len(shape))), label="order") for shape in shapes}
    amsgrad = data.draw(st.booleans(), label="amsgrad")
    unit = st.floats(0, 0.9999, allow_subnormal=False)
    options = dict(
        lr=data.draw(st.floats(0, 10, allow_subnormal=False), label="lr"),
        beta1=data.draw(unit, label="beta1"),
        beta2=data.draw(unit, label="beta2"),
        eps=data.draw(st.floats(1e-12, 1), label="eps"),
        weight_decay=data.draw(st.floats(0, 1, allow_subnormal=False), label="weight_decay"),
        decoupled=data.draw(st.booleans(), label="decoupled"),
        maximize=data.draw(st.booleans(), label="maximize"),
    )
    loop = AdamState(shapes, dtype, amsgrad=amsgrad)
    grads = loop.grads()
    ours = copy.deepcopy(loop)

    def laid_out(t: Tensor) -> Tensor:  # the same numbers, with the dimensions in another order in memory
        there = order[tuple(t.shape)]
        return t.permute(there).contiguous().permute([there.index(d) for d in range(t.dim())])

    for name in ("params", "exp_avgs", "exp_avg_sqs", "maxima"):
        setattr(ours, name, [laid_out(t) for t in getattr(ours, name)])
    assert ours.step([laid_out(g) for g in grads], **options) == DONE
    loop.loop(grads, **options)
    if exact():
        assert same(ours.all(), loop.all())
    else:
        assert [t.item() for t in ours.steps] == [t.item() for t in loop.steps]
