"""state_dict and load_state_dict: torch's format in both directions, and what torch's loading gets wrong."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.cases import (
    CASES,
    NUMBERS,
    TWINS,
    Case,
    build,
    each,
    each_config,
    gradients,
    leaves,
    parameters,
    run,
    same,
    snapshot,
)
from torchcalc import optim as ours

LOOP: dict[str, Any] = dict(foreach=False)


def through_a_file(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("to_torch", [False, True], ids=["from_torch", "to_torch"])
@each_config(TWINS)
def test_the_other_continues_to_the_last_bit(
    case: Case, config: dict[str, Any], to_torch: bool, dtype: torch.dtype
) -> None:
    assert case.twin is not None
    first, second = (case.cls, case.twin) if to_torch else (case.twin, case.cls)
    params = parameters(dtype)
    grads = gradients(params, 25)
    one = build(first, params, config, **LOOP)
    run(one, grads[:20])
    continued = copies(params)
    other = build(second, continued, dict(lr=0.5), **LOOP)
    other.load_state_dict(through_a_file(one.state_dict()))
    same(one.state_dict(), other.state_dict())
    run(one, grads[20:])
    run(other, grads[20:])
    same(params, continued)
    same(one.state_dict(), other.state_dict())


def by_file(optimizer: Any, params: list[nn.Parameter]) -> tuple[Any, list[nn.Parameter]]:
    new = copies(params)
    other = type(optimizer)(new, lr=0.7)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return other, new


def by_pickle(optimizer: Any, params: list[nn.Parameter]) -> tuple[Any, list[nn.Parameter]]:
    other, new = pickle.loads(pickle.dumps((optimizer, params)))
    return other, new


def by_deepcopy(optimizer: Any, params: list[nn.Parameter]) -> tuple[Any, list[nn.Parameter]]:
    other, new = copy.deepcopy((optimizer, params))
    return other, new


@pytest.mark.parametrize("way", [by_file, by_pickle, by_deepcopy])
@each_config()
def test_a_copy_continues_to_the_last_bit_on_its_own(
    case: Case, config: dict[str, Any], way: Callable[[Any, Any], tuple[Any, Any]]
) -> None:
    params = parameters()
    grads = gradients(params, 12)
    optimizer = build(case.cls, params, config)
    run(optimizer, grads[:8])
    other, _ = way(optimizer, params)
    assert repr(other) == repr(optimizer)
    before = snapshot(other)
    run(optimizer, grads[8:])
    same(snapshot(other), before)  # nothing is shared
    run(other, grads[8:])
    same(snapshot(other), snapshot(optimizer))


@each()
def test_an_optimizer_that_never_stepped_can_be_saved(case: Case) -> None:
    params = parameters()
    optimizer, new = by_file(build(case.cls, params, case.configs[0]), params)
    grads = gradients(new, 3)
    run(optimizer, grads)
    run(build(case.cls, params, case.configs[0]), grads)
    same(params, new)


@each(TWINS)
def test_exceptions_are_torchs_and_change_nothing(case: Case) -> None:
    assert case.twin is not None
    params = parameters()
    good = build(case.cls, params, case.configs[0]).state_dict()
    group = good["param_groups"][0]
    bad: list[dict[str, Any]] = [
        {**good, "param_groups": []},
        {**good, "param_groups": [group, group]},
        {**good, "param_groups": [{**group, "params": group["params"][:-1]}]},
        {"state": good["state"]},
    ]
    mine, theirs = build(case.cls, params, case.configs[0]), build(case.twin, copies(params), case.configs[0])
    run(mine, gradients(params, 3))
    before = snapshot(mine)
    for state_dict in bad:
        with pytest.raises((ValueError, KeyError)) as stock:
            theirs.load_state_dict(state_dict)
        with pytest.raises(stock.type) as raised:
            mine.load_state_dict(state_dict)
        assert str(raised.value).startswith(str(stock.value))
        same(snapshot(mine), before)


@each()
def test_loading_copies_and_leaves_the_state_dict_alone(case: Case) -> None:
    params = parameters()
    source = build(case.cls, params, case.configs[0])
    run(source, gradients(params, 3))
    state_dict = source.state_dict()
    before = copy.deepcopy(state_dict)
    new = copies(params)
    a, b = (build(case.cls, new, case.configs[0]) for _ in range(2))
    a.load_state_dict(state_dict)
    b.load_state_dict(state_dict)
    run(a, gradients(new, 3))
    same(state_dict, before)
    a_tensors, b_tensors = (
        {x.data_ptr() for _, x in leaves(o.state_dict()) if isinstance(x, Tensor) and x.numel()} for o in (a, b)
    )
    assert not a_tensors & b_tensors


@pytest.mark.parametrize("option", ["foreach", "fused", "capturable", "differentiable"])
@each()
def test_how_to_compute_is_the_constructors_to_say(case: Case, option: str) -> None:
    if not case.takes(option):
        return
    params = parameters()
    state_dict = build(case.cls, params, dict(lr=0.25)).state_dict()
    optimizer = build(case.cls, copies(params), dict(lr=0.5), **{option: True})
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0][option] is True
    assert optimizer.param_groups[0]["lr"] == 0.25  # what was learnt is the checkpoint's


@pytest.mark.parametrize(
    ("weights", "state", "loaded"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
@each(tuple(case for case in CASES if case.cls is not ours.GradientDescent))
def test_state_is_widened_and_never_rounded(
    case: Case, weights: torch.dtype, state: torch.dtype, loaded: torch.dtype
) -> None:
    config = dict(lr=0.01, **({"momentum": 0.9} if case.cls is ours.SGD else {}))
    params = parameters(state)
    source = build(case.cls, params, config)
    run(source, gradients(params, 3, missing=False))
    new = [nn.Parameter(p.detach().to(weights)) for p in params]
    optimizer = build(case.cls, new, config)
    optimizer.load_state_dict(source.state_dict())
    for p, q in zip(params, new, strict=True):
        for key, x in source.state[p].items():
            expected = x.to(loaded) if x.dim() or key not in NUMBERS else x
            same(optimizer.state[q][key], expected)
    run(optimizer, gradients(new, 1, missing=False))
    assert all(p.dtype == weights and p.isfinite().all() for p in new)
    widths = {x.dtype for q in new for key, x in optimizer.state[q].items() if key not in NUMBERS}
    assert widths == {loaded}


@pytest.mark.parametrize("foreach", [None, False, True])
def test_a_bfloat16_weight_with_float32_state_rounds_once_a_step(foreach: bool | None) -> None:
    """It goes where a float32 weight goes, and is rounded to bfloat16 at the end of the step, and nowhere before."""
    params = parameters()
    source = ours.AdamW(params, lr=0.01)
    run(source, gradients(params, 3, missing=False))
    narrow = [nn.Parameter(p.detach().bfloat16()) for p in params]
    wide = [nn.Parameter(p.detach().float()) for p in narrow]
    mine, exact = ours.AdamW(narrow, foreach=foreach), torch.optim.AdamW(wide, foreach=False)
    mine.load_state_dict(source.state_dict())
    exact.load_state_dict(source.state_dict())
    for _ in range(5):
        grads = gradients(narrow, 1, seed=3, missing=False)
        run(mine, grads)
        run(exact, [[g.float() for g in step if g is not None] for step in grads])
        for p, q in zip(narrow, wide, strict=True):
            torch.testing.assert_close(p.detach(), q.detach().bfloat16(), rtol=2**-8, atol=0)  # 1 ulp
            torch.testing.assert_close(mine.state[p]["exp_avg_sq"], exact.state[q]["exp_avg_sq"], rtol=1e-6, atol=0)
            q.data.copy_(p)


@each(TWINS)
def test_checkpoints_of_old_with_numbers_for_tensors(case: Case) -> None:
    assert case.twin is not None
    params = parameters()
    source = build(case.cls, params, case.configs[0], **LOOP)
    run(source, gradients(params, 3))
    old = copy.deepcopy(source.state_dict())
    for state in old["state"].values():
        for key in state.keys() & set(NUMBERS):
            state[key] = state[key].item()
    for key in ("maximize", "foreach", "differentiable", "fused", "capturable"):
        old["param_groups"][0].pop(key, None)
    new = copies(params)
    optimizer = build(case.cls, new, case.configs[0], **LOOP)
    optimizer.load_state_dict(old)
    run(source, gradients(params, 3))
    run(optimizer, gradients(new, 3))
    same(params, new)
    same(source.state_dict(), optimizer.state_dict())


def test_state_of_others_is_kept_and_nested_state_is_copied() -> None:
    params = parameters()
    optimizer = ours.SGD(params)
    inner = torch.ones(2)
    state_dict = optimizer.state_dict()
    state_dict["state"] = {0: {"mine": [inner, {"deep": inner}], "name": "a string"}, "not a parameter": 7}
    optimizer.load_state_dict(state_dict)
    state = optimizer.state[params[0]]
    assert state["name"] == "a string"
    assert optimizer.state["not a parameter"] == 7
    inner.zero_()
    assert state["mine"][0].sum() == 2
    assert state["mine"][1]["deep"].sum() == 2


def test_adamw_stays_adamw_and_adam_becomes_what_it_loads() -> None:
    params = parameters()
    adamw = ours.AdamW(params)
    adamw.load_state_dict(ours.Adam(params).state_dict())
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True
    adam = ours.Adam(params)
    adam.load_state_dict(torch.optim.AdamW(params).state_dict())
    assert adam.param_groups[0]["decoupled_weight_decay"] is True


def test_param_names_are_loaded_or_kept() -> None:
    named = [(f"layer.{i}", p) for i, p in enumerate(parameters())]
    optimizer = ours.Adam(named)
    optimizer.load_state_dict(ours.Adam([p for _, p in named]).state_dict())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in named]
    renamed = [(f"other.{i}", p) for i, p in enumerate(parameters())]
    optimizer.load_state_dict(torch.optim.Adam(renamed).state_dict())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in renamed]
