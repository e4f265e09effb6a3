"""Which way a step goes: a kernel takes what it can, the rule takes the rest, and neither holds what others may want."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.cases import (
    CASES,
    Case,
    build,
    each,
    each_config,
    gradients,
    parameters,
    run,
    same,
    set_gradients,
)
from tests.optim.test_layouts import channels_last, column, contiguous, strided, transposed
from torchcalc import native
from torchcalc.native import load


def ruled(monkeypatch: pytest.MonkeyPatch, case: Case) -> list[Tensor]:
    """The parameters that the rule steps from now on."""
    seen: list[Tensor] = []
    rule = case.cls.rule  # type: ignore[attr-defined]

    def watched(p: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(p)
        rule(p, *args, **kwargs)

    monkeypatch.setattr(case.cls, "rule", staticmethod(watched))
    return seen


WITH_KERNEL = tuple(case for case in CASES if case.cls.native is not None)  # type: ignore[attr-defined]


@each(WITH_KERNEL)
def test_parameters_that_share_memory_leave_the_others_to_the_kernel(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shared() -> list[nn.Parameter]:
        params = parameters(shapes=((3,), (4,), (5,), (6,)))
        whole = torch.linspace(-1.0, 1.0, 6)
        return [*params, nn.Parameter(whole), nn.Parameter(whole[2:5]), nn.Parameter(whole[:2])]

    params, clean = shared(), shared()
    grads = gradients(params, 6, missing=False)
    optimizer, loop = build(case.cls, params, case.configs[1]), build(case.cls, clean, case.configs[1], foreach=False)
    run(optimizer, grads[:2])
    run(loop, grads)
    seen = ruled(monkeypatch, case)
    run(optimizer, grads[2:])
    if native.available():
        assert len(seen) == 4 * 3
    torch.testing.assert_close(params, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("way", ["loaded", "converted"])
@each(WITH_KERNEL)
def test_state_follows_its_parameters_dtype_back_to_the_kernel(
    case: Case, way: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model trained in one precision and continued in the other: rounded, or widened, once."""
    before, after = dtypes
    params = parameters(before)
    optimizer = build(case.cls, params, case.configs[1])
    run(optimizer, gradients(params, 3, missing=False))
    state_dict = copy.deepcopy(optimizer.state_dict())
    if way == "converted":
        for p in params:
            p.grad = None
            p.data = p.data.to(after)
    else:
        params = [nn.Parameter(p.detach().to(after)) for p in params]
        optimizer = build(case.cls, params, case.configs[1])
        optimizer.load_state_dict(state_dict)
    run(optimizer, gradients(params, 1, missing=False))
    seen = ruled(monkeypatch, case)
    run(optimizer, gradients(params, 2, missing=False))
    if native.available():
        assert not seen
    assert {x.dtype for s in optimizer.state.values() for key, x in s.items() if key not in ("step", "mu_product")} == {
        after
    }


# Without kernels.


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_loaded", load._Loaded(None, "none in this test", None, "", intended=True))


WITH_TORCHS = tuple(case for case in CASES if case.cls.torch_fused is not None)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_config(WITH_TORCHS)
def test_without_kernels_torchs_own_operation_steps(
    case: Case, config: dict[str, Any], dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = ((3, 4), (5,), (), (2, 3, 2, 3), (1000,))
    params, loop = parameters(dtype, shapes=shapes), parameters(dtype, shapes=shapes)
    for p in (params[3], loop[3]):
        p.data = channels_last(p.data)
    ours, by_loop = build(case.cls, params, config, **options), build(case.cls, loop, config, foreach=False)
    grads = gradients(params, 10)
    for step in grads:
        step[3] = None if step[3] is None else channels_last(step[3])
    run(by_loop, grads)
    seen = ruled(monkeypatch, case)
    versions = [p._version for p in params]
    run(ours, grads)
    assert not seen
    precision = {"rtol": 1e-6, "atol": 1e-6} if isinstance(config["lr"], Tensor) else {}  # a float32 number in the loop
    torch.testing.assert_close(params, loop, **precision)
    torch.testing.assert_close(ours.state_dict()["state"], by_loop.state_dict()["state"], check_dtype=not options)
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    for p, g in zip(params, grads[-1], strict=True):
        assert p.grad is None or torch.equal(p.grad, g)


NOT_TORCHS = {
    "half": ({}, torch.bfloat16, contiguous, contiguous),
    "strided": ({}, torch.float32, strided, strided),
    "column": ({}, torch.float32, column, contiguous),
    "transposed": ({}, torch.float32, transposed, transposed),
    "another gradient": ({}, torch.float32, contiguous, channels_last),
    "max_norm": ({"max_norm": 0.1}, torch.float32, contiguous, contiguous),
    "foreach": ({"foreach": True}, torch.float32, contiguous, contiguous),
    "loop": ({"foreach": False}, torch.float32, contiguous, contiguous),
    "differentiable": ({"differentiable": True}, torch.float32, contiguous, contiguous),
}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("reason", NOT_TORCHS)
@each(WITH_TORCHS)
def test_torchs_operation_steps_only_what_it_is_right_for(
    case: Case, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, dtype, layout, layout_of_gradient = NOT_TORCHS[reason]
    (p,), seen = parameters(dtype, shapes=((4, 6, 3, 5),)), ruled(monkeypatch, case)
    p.data = layout(p.data)
    optimizer = build(case.cls, [p.clone() if "differentiable" in options else p], case.configs[1], **options)
    for g in (layout_of_gradient(torch.randn(p.shape, dtype=dtype)) for _ in range(2)):
        set_gradients(optimizer.param_groups[0]["params"], [g])
        optimizer.step()
    assert len(seen) == 2


@pytest.fixture
def missing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_loaded", load._Loaded(None, "not built. Run this.", None, "the kernels are not loaded"))
    monkeypatch.setattr(load, "_warned", False)


@pytest.mark.usefixtures("missing_kernels")
@each()
def test_one_warning_at_the_first_step_without_kernels(case: Case) -> None:
    params = parameters()
    set_gradients(params, gradients(params, 1, missing=False)[0])
    for options in ({"foreach": False}, {"foreach": True}):
        if all(map(case.takes, options)):
            build(case.cls, params, case.configs[0], **options).step()
    optimizer = build(case.cls, params, case.configs[0])
    with pytest.warns(RuntimeWarning, match="without its CPU kernels.*Run this") as caught:
        optimizer.step()
    assert [w.filename for w in caught] == [__file__]
    optimizer.step()


@pytest.mark.usefixtures("missing_kernels")
def test_one_warning_at_the_first_norm_without_kernels() -> None:
    (p,) = parameters(torch.complex64, shapes=((3,),))
    set_gradients([p], [torch.ones(3, dtype=torch.complex64)])
    build(CASES[0].cls, [p], {}, max_norm=1.0).step()  # no kernel takes this
    (p,) = parameters(shapes=((3,),))
    set_gradients([p], [torch.ones(3)])
    optimizer = build(CASES[0].cls, [p], {}, max_norm=1.0, foreach=True)
    with pytest.warns(RuntimeWarning, match="without its CPU kernels.*Run this"):
        optimizer.step()


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@each()
def test_a_module_may_swap_its_parameters_after_a_step(case: Case) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    other = copy.deepcopy(model)
    optimizer, same_optimizer = (build(case.cls, m.parameters(), case.configs[0]) for m in (model, other))
    for m, o in ((model, optimizer), (other, same_optimizer)):
        m(torch.ones(1, 3)).sum().backward()
        o.step()
        o.zero_grad()
    model.to(torch.float64)
    for p in other.parameters():
        p.data = p.data.double()
    for m, o in ((model, optimizer), (other, same_optimizer)):
        m(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
        o.step()
    same(list(model.parameters()), list(other.parameters()))
    assert model.weight.dtype == torch.float64


@pytest.mark.parametrize("lets_go", [True, False])
@each()
def test_a_module_may_swap_its_parameters_where_that_is_wanted_after_a_step(
    case: Case, lets_go: bool, request: Any
) -> None:
    model = nn.Linear(3, 2)
    optimizer = build(case.cls, model.parameters(), case.configs[0])
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    request.getfixturevalue("swapping")
    if lets_go:
        optimizer.zero_grad()
    model.to(torch.float64)
    optimizer.zero_grad()
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert model.weight.dtype == torch.float64


@each()
def test_a_group_that_was_removed_is_not_held(case: Case) -> None:
    params = parameters(shapes=((3,), (4,)))
    optimizer = build(case.cls, [{"params": [p]} for p in params], case.configs[0])
    set_gradients(params, [torch.ones(3), torch.ones(4)])
    optimizer.step()
    state = list(optimizer.state.get(params[1], {}).values())
    gone = [weakref.ref(t) for t in (params[1], *state) if isinstance(t, Tensor)]
    optimizer.state.pop(params[1], None)
    del optimizer.param_groups[1], params[1], state
    optimizer.zero_grad()
    assert [r() for r in gone] == [None] * len(gone)
    set_gradients(params, [torch.ones(3)])
    optimizer.step()


def moved(p: nn.Parameter, state: dict[str, Any]) -> None:
    p.data = p.data.clone()


def turned(p: nn.Parameter, state: dict[str, Any]) -> None:
    p.data = p.data.t()


def written(p: nn.Parameter, state: dict[str, Any]) -> None:
    p.data.mul_(2)


def swapped(p: nn.Parameter, state: dict[str, Any]) -> None:
    other = nn.Parameter(p.detach().clone())
    assert p.grad is not None
    other.grad = p.grad.clone()
    torch.utils.swap_tensors(p, other)


def replaced(p: nn.Parameter, state: dict[str, Any]) -> None:
    state.update({key: x * 0.5 for key, x in state.items() if isinstance(x, Tensor) and x.dim()})


def frozen(p: nn.Parameter, state: dict[str, Any]) -> None:
    p.grad = None


@pytest.mark.parametrize("change", [moved, turned, written, swapped, replaced, frozen])
@each()
def test_what_may_change_between_steps(case: Case, change: Callable[[nn.Parameter, dict[str, Any]], None]) -> None:
    ends = []
    for options in ({}, {"foreach": False}):
        params = parameters(shapes=((6, 6), (5,)))
        optimizer = build(case.cls, params, case.configs[0], **options)
        for step, grads in enumerate(gradients(params, 6, missing=False)):
            set_gradients(params, grads)
            if step == 3:
                change(params[0], optimizer.state.get(params[0], {}))
            optimizer.step()
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
