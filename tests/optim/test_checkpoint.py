"""state_dict and load_state_dict: torch's format in both directions, and what torch's loading gets wrong."""

from __future__ import annotations

import copy
import io
import itertools
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
    set_gradients,
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
    for key in ("maximize", "foreach", "differentiable", "fused", "capturable", "decoupled_weight_decay"):
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
    unnamed = ours.Adam(parameters())
    unnamed.load_state_dict(torch.optim.Adam(named).state_dict())
    assert unnamed.param_groups[0]["param_names"] == [name for name, _ in named]


# What does not fit.


def group_keys(case: Case) -> list[str]:
    group = case.cls(parameters(), **case.configs[0]).param_groups[0]
    return [key for key in group if key not in ("params", "foreach", "fused", "capturable", "differentiable")]


@pytest.mark.parametrize(
    ("case", "key"), [pytest.param(c, key, id=f"{c.name}-{key}") for c in TWINS for key in group_keys(c)]
)
def test_a_missing_hyperparameter_is_what_torch_makes_of_it_or_refused(case: Case, key: str) -> None:
    """torch's __setstate__ knows what the files of its old versions lack. What is not there either was never left out.

    A file that lacks a key for its age lacks all that were added later.
    """
    assert case.twin is not None
    params = parameters()
    source = build(case.twin, params, case.configs[0])
    run(source, gradients(params, 2))
    state_dict = source.state_dict()
    later = list(case.cls.added_later)
    for lacking in (key, *(later[later.index(key) + 1 :] if key in later else ())):
        state_dict["param_groups"][0].pop(lacking, None)
    stock = build(case.twin, copies(params), case.configs[0])
    stock.load_state_dict(state_dict)
    mine = build(case.cls, copies(params), case.configs[-1])
    before = snapshot(mine)
    if key in stock.param_groups[0]:
        mine.load_state_dict(state_dict)
        assert mine.param_groups[0][key] == stock.param_groups[0][key]
        return
    with pytest.raises(ValueError, match=f"group 0 of the state dict lacks what {case.name} needs: {key}") as raised:
        mine.load_state_dict(state_dict)
    assert "strict=False" in str(raised.value)
    same(snapshot(mine), before)
    with pytest.warns(UserWarning, match=f"left out what does not fit:\ngroup 0 .* {key}"):
        mine.load_state_dict(state_dict, strict=False)
    same(mine.param_groups[0][key], before["optimizer"]["param_groups"][0][key])
    same(mine.state_dict()["state"], state_dict["state"])


@pytest.mark.parametrize(
    ("case", "key", "younger"),
    [
        pytest.param(c, key, younger, id=f"{c.name}-{key}-{younger}")
        for c in TWINS
        for key, younger in itertools.combinations(c.cls.added_later, 2)
        if key != "foreach"
    ],
)
def test_a_key_is_not_missing_for_age_beside_a_younger_one(case: Case, key: str, younger: str) -> None:
    """Such a file is of another optimizer: RAdam's has ``maximize``, as Adam's have had after ``amsgrad``, and no amsgrad."""
    params = parameters()
    state_dict = build(case.cls, params, case.configs[0]).state_dict()
    for lacking in case.cls.added_later.keys() - {younger}:
        state_dict["param_groups"][0].pop(lacking, None)
    with pytest.raises(ValueError, match=f"lacks what {case.name} needs: .*{key}"):
        build(case.cls, copies(params), case.configs[0]).load_state_dict(state_dict)


FOREIGN: list[Any] = [
    *(case.cls for case in CASES),
    *(case.twin for case in TWINS),
    *(torch.optim.Adamax, torch.optim.Adadelta, torch.optim.ASGD, torch.optim.Rprop, torch.optim.LBFGS),
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda c: f"{c.__module__.partition('.')[0]}.{c.__name__}")
@each()
def test_another_optimizers_state_dict_is_refused(case: Case, foreign: Any) -> None:
    adams = {"Adam", "AdamW"}
    if foreign.__name__ == case.name or {foreign.__name__, case.name} <= adams:
        return
    params = parameters()
    source = foreign(params, lr=0.1)
    set_gradients(params, gradients(params, 1, missing=False)[0])
    source.step(lambda: 1.0)
    mine = build(case.cls, copies(params), case.configs[0])
    run(mine, gradients(params, 2))
    before = snapshot(mine)
    with pytest.raises(ValueError, match=r"lacks|does not have its"):
        mine.load_state_dict(source.state_dict())
    same(snapshot(mine), before)


def test_keys_of_a_groups_user_are_no_hyperparameters() -> None:
    """Schedulers and users keep notes in groups; and a group may have an option of another optimizer, if both know."""
    params = parameters()
    state_dict = torch.optim.SGD([{"params": params, "name": "all", "eps": 1.0}], lr=0.1).state_dict()
    state_dict["param_groups"][0].update(initial_lr=0.1, max_momentum=0.9)
    optimizer = ours.SGD([{"params": copies(params), "eps": 1.0}], lr=0.1)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["max_momentum"] == 0.9
    with pytest.raises(ValueError, match=r"another optimizer's: SGD does not have its eps=1\.0"):
        ours.SGD(copies(params), lr=0.1).load_state_dict(state_dict)


STATES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    (
        "another shape",
        lambda s: s.update(exp_avg=torch.ones(3, 2)),
        r"exp_avg of conv: expected .* \(3, 4\), found \(3, 2\)",
    ),
    ("no tensor", lambda s: s.update(exp_avg=1.0), r"exp_avg of conv: expected .* \(3, 4\), found 1.0"),
    ("many steps", lambda s: s.update(step=torch.ones(2)), r"step of conv: expected one number, found shape \(2,\)"),
    (
        "no slot",
        lambda s: s.pop("exp_avg_sq"),
        r"state of conv lacks \['exp_avg_sq'\]; expected .* found \['exp_avg', 'step'\]",
    ),
    ("no step", lambda s: s.pop("step"), r"state of conv lacks \['step'\]"),
]


@pytest.mark.parametrize(("change", "told"), [row[1:] for row in STATES], ids=[row[0] for row in STATES])
def test_state_that_is_not_the_parameters_is_refused(change: Callable[[dict[str, Any]], Any], told: str) -> None:
    names = ["conv", "bias", "scale", "none", "kernel"]
    params, new = parameters(), parameters()
    source = torch.optim.AdamW(zip(names, params, strict=True))
    run(source, gradients(params, 2, missing=False))
    state_dict = copy.deepcopy(source.state_dict())
    change(state_dict["state"][0])
    mine = ours.AdamW(zip(names, new, strict=True))
    run(mine, gradients(new, 1, missing=False))
    before = snapshot(mine)
    with pytest.raises(ValueError, match=told):
        mine.load_state_dict(state_dict)
    same(snapshot(mine), before)
    with pytest.warns(UserWarning, match=told) as caught:
        mine.load_state_dict(state_dict, strict=False)
    assert caught[0].filename == __file__
    same(mine.state_dict()["state"][0], before["optimizer"]["state"][0])  # the parameter keeps what it has
    same(mine.state_dict()["state"][1], source.state_dict()["state"][1])  # the others get theirs


def test_parameters_are_found_by_name() -> None:
    """In another order, in groups of another order, and wrapped; torch takes them in the order that they come."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    named = dict(model.named_parameters())
    layers = [{k: p for k, p in named.items() if k[0] == i} for i in "01"]
    source = torch.optim.AdamW(
        [{"params": [*layers[0].items()]}, {"params": [*layers[1].items()], "lr": 0.5}]  # type: ignore[list-item]
    )
    run(source, gradients([*named.values()], 3, missing=False))
    new = copy.deepcopy(named)
    other = [
        [(f"module._orig_mod.{k}", new[k]) for k in reversed(layers[1])],
        [(f"module._orig_mod.{k}", new[k]) for k in reversed(layers[0])],
    ]
    mine = ours.AdamW([{"params": other[0]}, {"params": other[1]}])
    mine.load_state_dict(source.state_dict())
    for name, p in named.items():
        same(mine.state[new[name]], source.state[p])
    assert [group["lr"] for group in mine.param_groups] == [0.5, 1e-3]
    assert mine.param_groups[0]["param_names"] == [name for name, _ in other[0]]


def test_unknown_names_are_refused_and_left_out_where_strict_is_false() -> None:
    p, q, r = parameters(shapes=((3,), (3,), (3,)))
    source = ours.AdamW([("a", p), ("b", q)])
    run(source, gradients([p, q], 2, missing=False))
    mine = ours.AdamW([("c", r), ("a", nn.Parameter(p.detach().clone()))])
    before = snapshot(mine)
    with pytest.raises(
        ValueError, match="group 0 differ: the state dict lacks 'c', and the optimizer has no 'b'; delete"
    ):
        mine.load_state_dict(source.state_dict())
    same(snapshot(mine), before)
    with pytest.warns(UserWarning, match="lacks 'c'"):
        mine.load_state_dict(source.state_dict(), strict=False)
    assert r not in mine.state
    same(mine.state[mine.param_groups[0]["params"][1]], source.state[p])
    with pytest.raises(ValueError, match=r"doesn't match the size of optimizer's group: .* lacks 'c'"):
        ours.AdamW([("a", p), ("b", q), ("c", r)]).load_state_dict(source.state_dict())


def test_groups_that_the_state_dict_lacks_stay_as_they_are() -> None:
    p, q = parameters(shapes=((3,), (3,)))
    source = ours.SGD([p], lr=0.25, momentum=0.9)
    run(source, gradients([p], 2, missing=False))
    mine = ours.SGD(
        [{"params": [nn.Parameter(p.detach().clone())]}, {"params": [q], "lr": 0.125}], lr=1.0, momentum=0.5
    )
    run(mine, gradients([p, q], 1, missing=False))
    buffer = mine.state[q]["momentum_buffer"].clone()
    with pytest.warns(UserWarning, match="different number of parameter groups: 1, but the optimizer has 2"):
        mine.load_state_dict(source.state_dict(), strict=False)
    assert [(g["lr"], g["momentum"]) for g in mine.param_groups] == [(0.25, 0.9), (0.125, 0.5)]
    same(mine.state[q]["momentum_buffer"], buffer)
    with pytest.warns(UserWarning, match="different number of parameter groups: 2, but the optimizer has 1"):
        source.load_state_dict(mine.state_dict(), strict=False)
    assert list(source.state) == [p]


@each()
def test_a_copy_has_the_attributes_of_the_original(case: Case) -> None:
    optimizer = build(case.cls, parameters(), case.configs[0])
    run(optimizer, gradients(optimizer.param_groups[0]["params"], 2))
    assert vars(copy.deepcopy(optimizer)).keys() <= vars(optimizer).keys()
