"""The driver's manners: hooks, closures, groups, named parameters, repr, zero_grad; as torch.optim has them."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.optim.cases import (
    CASES,
    TWINS,
    Case,
    build,
    each,
    gradients,
    parameters,
    run,
    same,
    set_gradients,
    snapshot,
)
from torchcalc import optim as ours

ANY = dict(lr=0.1)


# Hooks.


@each()
def test_step_hooks_run_in_torchs_order_with_torchs_arguments(case: Case) -> None:
    def events_of(cls: Any) -> list[Any]:
        params = parameters()
        optimizer = build(cls, params, ANY)
        set_gradients(params, gradients(params, 1)[0])
        seen: list[Any] = []

        def hook(name: str) -> Any:
            def record(who: Any, args: Any, kwargs: Any) -> None:
                assert who is optimizer
                seen.append((name, len(args), kwargs, params[1].grad is None))

            return record

        handles = [
            optimizer.register_step_pre_hook(hook("own pre")),
            optimizer.register_step_post_hook(hook("own post")),
            register_optimizer_step_pre_hook(hook("global pre")),
            register_optimizer_step_post_hook(hook("global post")),
        ]
        try:
            optimizer.step()
            optimizer.step(closure=None)
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        return seen

    events = events_of(case.cls)
    assert [name for name, *_ in events] == ["global pre", "own pre", "own post", "global post"] * 2
    if case.twin is not None:
        assert events == events_of(case.twin)


@each()
def test_a_pre_hook_may_replace_the_arguments_and_the_gradients(case: Case) -> None:
    params, clean = parameters(), parameters()
    grads = gradients(params, 1, missing=False)
    optimizer = build(case.cls, params, ANY)
    calls: list[str] = []

    def closure() -> float:
        calls.append("closure")
        set_gradients(params, grads[0])
        return 7.0

    optimizer.register_step_pre_hook(lambda who, args, kwargs: ((args[0], closure), {}))
    assert optimizer.step() == 7.0
    assert calls
    other = build(case.cls, clean, ANY)
    set_gradients(clean, grads[0])
    other.step()
    same(params, clean)

    optimizer.register_step_pre_hook(lambda who, args, kwargs: "nonsense")
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\)"):
        optimizer.step()
    same(snapshot(optimizer), before)


@each()
def test_state_dict_hooks(case: Case) -> None:
    optimizer = build(case.cls, parameters(), ANY)
    order: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda who: order.append("second"))
    optimizer.register_state_dict_pre_hook(lambda who: order.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda who, state_dict: state_dict.update(extra=1))
    optimizer.register_state_dict_post_hook(lambda who, state_dict: {**state_dict, "replaced": True})
    state_dict = optimizer.state_dict()
    assert order == ["first", "second"]
    assert (state_dict["extra"], state_dict["replaced"]) == (1, True)


@each()
def test_load_state_dict_hooks(case: Case) -> None:
    optimizer = build(case.cls, parameters(), ANY)
    order: list[str] = []
    given = optimizer.state_dict()
    given["param_groups"][0]["lr"] = 0.2

    def halve(who: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        order.append("pre")
        new = copy.deepcopy(state_dict)
        new["param_groups"][0]["lr"] /= 2
        return new

    def forget(who: Any, state_dict: dict[str, Any]) -> None:
        order.append("first")
        state_dict["unknown"] = 1  # of a shallow copy

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_pre_hook(forget, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda who: order.append(f"post, lr {who.param_groups[0]['lr']}"))
    optimizer.load_state_dict(given)
    assert order == ["first", "pre", "post, lr 0.1"]
    assert "unknown" not in given
    assert given["param_groups"][0]["lr"] == 0.2


@each()
def test_hooks_survive_loading_and_the_profiler_sees_the_name(case: Case) -> None:
    params = parameters()
    optimizer = build(case.cls, params, ANY)
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    optimizer.load_state_dict(optimizer.state_dict())
    # acc_events: before torch 2.13 the profiler warns without it.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        run(optimizer, gradients(params, 1))
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {f"Optimizer.step#{case.name}.step", f"Optimizer.zero_grad#{case.name}.zero_grad"} <= names
    assert seen == [1]


# Closures, grad mode.


@each()
def test_a_closure_runs_with_grad_and_its_loss_is_returned(case: Case) -> None:
    x = nn.Parameter(torch.tensor([2.0]))
    optimizer = case.cls([x], lr=0.125)
    modes: list[bool] = []

    def closure() -> Tensor:
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 4.0
        assert not torch.is_grad_enabled()
    assert all(modes)
    assert x.item() < 2
    assert torch.is_grad_enabled()


@each()
def test_an_exception_in_the_closure_leaves_all_as_it_was(case: Case) -> None:
    params = parameters()
    optimizer = build(case.cls, params, ANY)
    run(optimizer, gradients(params, 2))
    before = snapshot(optimizer)

    def closure() -> float:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), torch.no_grad():
        optimizer.step(closure)
    same(snapshot(optimizer), before)


@each()
def test_steps_leave_no_graph(case: Case) -> None:
    params = parameters()
    optimizer = build(case.cls, params, ANY)
    run(optimizer, gradients(params, 3))
    assert all(p.is_leaf and p.requires_grad for p in params)
    assert not any(
        x.requires_grad for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)
    )


@each()
def test_backward_through_weights_that_a_step_has_changed_raises(case: Case) -> None:
    """Autograd must see that p was written, also by a kernel."""
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = build(case.cls, [p], ANY)
    loss = (p**2).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Groups and parameters.


@each()
def test_parameters_without_gradients_have_no_state_of_a_step(case: Case) -> None:
    params = parameters()
    optimizer = build(case.cls, params, ANY)
    before = copy.deepcopy(params)
    optimizer.step()
    same(params, before)
    assert all(float(state.get("step", 0)) == 0 for state in optimizer.state.values())


@each()
def test_add_param_group_in_mid_training_is_as_from_the_start(case: Case) -> None:
    params, whole = parameters(), parameters()
    grads = gradients(params, 9, missing=False)
    early = [[g if i < 2 or step >= 4 else None for i, g in enumerate(gs)] for step, gs in enumerate(grads)]
    optimizer = build(case.cls, params[:2], ANY)
    for step, gs in enumerate(early):
        if step == 4:
            optimizer.add_param_group({"params": params[2:], "lr": 0.03})
        run(optimizer, [gs[: len([p for g in optimizer.param_groups for p in g["params"]])]])
    other = build(case.cls, [{"params": whole[:2]}, {"params": whole[2:], "lr": 0.03}], ANY)
    run(other, early)
    same(params, whole)
    same(optimizer.state_dict(), other.state_dict())


def bad_groups(params: list[nn.Parameter]) -> dict[str, Any]:
    new = nn.Parameter(torch.ones(1))
    return {
        "not a dict": [new],
        "a set": {"params": {new}},
        "not a tensor": {"params": [1.0]},
        "not a leaf": {"params": [new * 2]},
        "in another group": {"params": params[0]},
        "named among unnamed": {"params": [("name", new)]},
        "half named": {"params": [("name", new), nn.Parameter(torch.ones(1))]},
        "no params": {"lr": 0.1},
    }


@pytest.mark.parametrize("bad", bad_groups(parameters()))
@each(TWINS)
def test_bad_groups_raise_as_torchs_and_change_nothing(case: Case, bad: str) -> None:
    assert case.twin is not None
    mine, theirs = parameters(), parameters()
    a, b = build(case.cls, mine, ANY), build(case.twin, theirs, ANY)
    run(a, gradients(mine, 2))
    before = snapshot(a)
    with pytest.raises((TypeError, ValueError, KeyError)) as stock:
        b.add_param_group(bad_groups(theirs)[bad])
    with pytest.raises(stock.type) as raised:
        a.add_param_group(bad_groups(mine)[bad])
    assert str(raised.value).startswith(str(stock.value))
    same(snapshot(a), before)


@pytest.mark.parametrize(
    "bad", [torch.ones(1), [], None, [{"params": [1]}], [nn.Parameter(torch.ones(1)), 2.0]], ids=str
)
@each(TWINS)
def test_bad_params_raise_as_torchs(case: Case, bad: Any) -> None:
    assert case.twin is not None
    with pytest.raises((TypeError, ValueError)) as stock:
        case.twin(bad, lr=0.1)
    with pytest.raises(stock.type) as raised:
        case.cls(bad, lr=0.1)
    assert str(raised.value).startswith(str(stock.value))


@each()
def test_duplicates_warn(case: Case) -> None:
    p = nn.Parameter(torch.ones(1))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        case.cls([p, p], lr=0.1)


@each()
def test_a_group_given_is_left_as_it_was(case: Case) -> None:
    group = {"params": iter(parameters()), "lr": 0.5}
    keys = set(group)
    optimizer = build(case.cls, [group], ANY)
    assert set(group) == keys
    assert len(optimizer.param_groups[0]["params"]) == len(parameters())


@each()
def test_named_parameters(case: Case) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = build(case.cls, model.named_parameters(), ANY)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    model(torch.ones(1, 2)).sum().backward()
    before = copy.deepcopy(list(model.parameters()))
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if case.twin is not None:
        same(
            optimizer.state_dict()["param_groups"],
            build(case.twin, model.named_parameters(), ANY).state_dict()["param_groups"],
        )


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("foreach", [None, True])
@each()
def test_zero_grad(case: Case, foreach: bool | None, set_to_none: bool) -> None:
    params = parameters()
    optimizer = build(case.cls, params, ANY, foreach=foreach)
    set_gradients(params, gradients(params, 1)[0])
    had = [p.grad is not None for p in params]
    assert any(had)
    assert not all(had)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert [p.grad is not None and not set_to_none for p in params] == [h and not set_to_none for h in had]
    assert all(p.grad is None or not p.grad.any() for p in params)


@each(TWINS)
def test_repr_is_torchs(case: Case) -> None:
    assert case.twin is not None
    for config in case.configs:
        groups = [{"params": parameters()[:1], "name": "head"}, {"params": parameters()[1:2], "lr": 0.3}]
        assert repr(build(case.cls, groups, config)) == repr(build(case.twin, copy.deepcopy(groups), config))


@each(TWINS)
def test_the_signature_is_torchs(case: Case) -> None:
    """Names, order, kinds and defaults; options that torch lacks come after, by keyword only."""
    import inspect

    assert case.twin is not None
    mine, theirs = (list(inspect.signature(cls).parameters.values()) for cls in (case.cls, case.twin))
    assert [(p.name, p.kind, p.default) for p in mine[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in mine[len(theirs) :])


@each()
def test_what_changes_between_steps_counts(case: Case) -> None:
    """A plan made for one step must not outlive what it was made from."""

    def trajectory(**options: Any) -> Any:
        params = parameters()
        optimizer = build(case.cls, params, case.configs[0], **options)
        grads = iter(gradients(params, 20, missing=False))
        seen = []

        def step() -> None:
            run(optimizer, [next(grads)[: len([p for g in optimizer.param_groups for p in g["params"]])]])
            seen.append([p.detach().clone() for p in params])

        step()
        step()
        params[0].data = params[0].data.clone() * 2  # moved
        step()
        params[4].data = params[4].data.contiguous(memory_format=torch.channels_last)  # other strides
        step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # other state tensors
        step()
        optimizer.param_groups[0]["lr"] = 0.003
        optimizer.param_groups[0]["maximize"] = True
        step()
        optimizer.state[params[2]].clear()  # forgotten: starts anew
        step()
        optimizer.param_groups[0]["params"][1] = params[1] = nn.Parameter(params[1].detach() + 1)  # another parameter
        step()
        optimizer.param_groups[0]["params"].pop()
        step()
        return seen

    default, loop = trajectory(), trajectory(foreach=False)
    for a, b in zip(default, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


TOGGLES: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (ours.Adam, dict(betas=(0.5, 0.5)), dict(amsgrad=True)),
    (ours.Adam, dict(betas=(0.5, 0.5), amsgrad=True), dict(amsgrad=False)),
    (ours.AdamW, {}, dict(decoupled_weight_decay=False, weight_decay=0.5)),
    (ours.SGD, {}, dict(momentum=0.9)),
    (ours.SGD, dict(momentum=0.9), dict(momentum=0.0)),
    (ours.SGD, dict(momentum=0.9), dict(nesterov=True, weight_decay=0.5)),
    (ours.RMSprop, {}, dict(centered=True, momentum=0.9)),
]


@pytest.mark.parametrize(("cls", "config", "toggle"), TOGGLES, ids=lambda x: getattr(x, "__name__", None) or str(x))
def test_options_of_a_group_may_change_between_steps(cls: Any, config: dict[str, Any], toggle: dict[str, Any]) -> None:
    """Slots that were not there start from zero; gradients shrink, so that amsgrad matters."""
    ends = []
    for options in ({}, dict(foreach=False), dict(foreach=True)):
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = cls([p], lr=0.1, **config, **options)
        for i in range(6):
            if i == 3:
                optimizer.param_groups[0].update(toggle)
            p.grad = torch.full_like(p, 0.3**i)
            optimizer.step()
        ends.append((p.detach(), optimizer.state[p]))
    for other in ends[1:]:
        torch.testing.assert_close(ends[0], other)


def test_every_optimizer_has_its_row() -> None:
    rows = {case.cls for case in CASES}
    exported = {getattr(ours, name) for name in ours.__all__}
    assert {x for x in exported if issubclass(x, ours.Optimizer) and x is not ours.Optimizer} == rows


LIGHT = """
import sys
import torch
assert "torch._dynamo" not in sys.modules, "torch itself imports it: this test says nothing"
from torchcalc import optim
assert "torch._dynamo" not in sys.modules, "import"
p = torch.nn.Parameter(torch.ones(3))
for cls in {classes}:
    optimizer = cls([p], lr=0.1)
    assert "torch._dynamo" not in sys.modules, f"{{cls.__name__}}()"
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert "torch._dynamo" not in sys.modules, f"{{cls.__name__}}.step()"
"""


def test_neither_import_nor_step_import_dynamo() -> None:
    classes = "[" + ", ".join(f"optim.{case.name}" for case in CASES) + "]"
    done = subprocess.run([sys.executable, "-c", LIGHT.format(classes=classes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_subclass_is_a_rule_and_its_names() -> None:
    """The interface that CONTRIBUTING tells: check, hyper, slots, rule."""

    class Signed(ours.Optimizer):
        @staticmethod
        def rule(p: Any, g: Any, m: Any, *, t: Any, lr: Any) -> None:
            m.add_(g)
            p.add_(m, alpha=-lr * t)

        def __init__(self, params: Any, lr: float = 0.5, foreach: bool | None = None) -> None:
            super().__init__(params, {"lr": lr, "foreach": foreach, "maximize": False, "differentiable": False})

        def check(self, group: dict[str, Any]) -> None:
            pass

        def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
            return {"lr": group["lr"]}

        def slots(self, group: dict[str, Any]) -> dict[str, str]:
            return {"m": "sum"}

    for foreach in (None, False, True):
        p = nn.Parameter(torch.zeros(2))
        optimizer = Signed([p], foreach=foreach)
        for _ in range(2):
            p.grad = torch.ones(2)
            optimizer.step()
        assert p.tolist() == [-0.5 * (1 + 2 * 2)] * 2
        assert optimizer.state_dict()["state"][0]["sum"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("key", ["weigth_decay", "momentun", "beta", "learning_rate"])
def test_misspelt_options_warn(key: str) -> None:
    close = key in ("weigth_decay", "momentun")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.SGD([{"params": parameters(), key: 0.1}], lr=0.1)
    assert bool(caught) == close
    if close:
        assert key in str(caught[0].message)
        assert "did you mean" in str(caught[0].message)
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "key",
    ["name", "lr_scale", "initial_lr", "max_momentum", "base_momentum", "max_lr", "min_lr", "group_name", "layer"],
)
@each()
def test_keys_of_the_users_own_do_not_warn(case: Case, key: str) -> None:
    optimizer = build(case.cls, [{"params": parameters(), key: 0.1}], ANY)  # warnings are errors
    assert optimizer.param_groups[0][key] == 0.1
    assert optimizer.state_dict()["param_groups"][0][key] == 0.1
