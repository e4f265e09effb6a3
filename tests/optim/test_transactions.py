"""A step that fails has not happened: what can be checked or made is so before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.cases import CASES, Case, build, each, gradients, parameters, run, same, set_gradients, snapshot
from torchcalc import optim as ours

#: Adagrad has its state from the constructor on.
LAZY = tuple(case for case in CASES if case.cls is not ours.Adagrad)
WAYS: list[dict[str, Any]] = [{}, dict(foreach=False), dict(foreach=True)]


def two_groups(case: Case, way: dict[str, Any], config: dict[str, Any]) -> tuple[Any, list[nn.Parameter]]:
    params = parameters()
    return build(case.cls, [{"params": params[:2]}, {"params": params[2:]}], config, **way), params


def config_of(case: Case) -> dict[str, Any]:
    """The one with most state; without tensors, which Adam refuses beside foreach=True."""
    return case.configs[2] if case.cls is ours.SGD else case.configs[1] if case.cls is not ours.GradientDescent else {}


@pytest.mark.parametrize(("stepped", "bad"), [(0, None), (0, torch.ones(2)), (2, "0.1")], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@each()
def test_a_bad_number_in_the_last_group_changes_nothing_in_the_first(
    case: Case, way: dict[str, Any], stepped: int, bad: Any
) -> None:
    """And the retry is the step that it would have been: momentum's first buffer is the gradient, undamped."""
    (optimizer, params), (clean, same_params) = (two_groups(case, way, config_of(case)) for _ in range(2))
    grads = gradients(params, stepped + 2, missing=False)
    run(optimizer, grads[:stepped])
    before, lr = snapshot(optimizer), optimizer.param_groups[1]["lr"]
    set_gradients(params, grads[stepped])
    optimizer.param_groups[1]["lr"] = bad
    with pytest.raises(TypeError, match=r"lr of parameter group 1 is .*; it must be a number or a 1-element tensor"):
        optimizer.step()
    optimizer.param_groups[1]["lr"] = lr
    same(snapshot(optimizer), before)
    run(optimizer, grads[stepped:])
    run(clean, grads)
    same(params, same_params)
    same(optimizer.state_dict(), clean.state_dict())


@pytest.mark.parametrize("way", WAYS, ids=str)
@each(tuple(case for case in LAZY if case.cls is not ours.GradientDescent))
def test_no_memory_for_the_last_slot_changes_nothing(
    case: Case, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (optimizer, params), (clean, same_params) = (two_groups(case, way, config_of(case)) for _ in range(2))
    grads = gradients(params, 2, missing=False)
    before, new_slot = snapshot(optimizer), case.cls.new_slot

    def no_memory(self: Any, key: str, p: Any, *args: Any) -> Any:
        if p is params[-1]:
            raise MemoryError
        return new_slot(self, key, p, *args)

    set_gradients(params, grads[0])
    with monkeypatch.context() as patch:
        patch.setattr(case.cls, "new_slot", no_memory)
        with pytest.raises(MemoryError):
            optimizer.step()
    same(snapshot(optimizer), before)
    run(optimizer, grads)
    run(clean, grads)
    same(params, same_params)
    same(optimizer.state_dict(), clean.state_dict())


@pytest.mark.parametrize("way", WAYS[1:], ids=str)
@each(LAZY)
def test_a_rule_that_fails_at_its_first_step_leaves_no_state(
    case: Case, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote to a weight before is not undone; but a slot that was made for it is not there at the retry."""
    (optimizer, params), (clean, same_params) = (two_groups(case, way, config_of(case)) for _ in range(2))
    grads = gradients(params, 2, missing=False)
    rule, calls = case.cls.rule, []

    def failing(p: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(p)
        if len(calls) > 1:
            raise MemoryError
        rule(p, *args, **kwargs)

    set_gradients(params, grads[0])
    with monkeypatch.context() as patch:
        patch.setattr(case.cls, "rule", staticmethod(failing))
        with pytest.raises(MemoryError):
            optimizer.step()
    done = 2 if way["foreach"] else 1
    has_state = bool(optimizer.slots(optimizer.param_groups[0]))
    assert [p in optimizer.state for p in params] == [has_state and i < done for i in range(len(params))]
    set_gradients(params, [None] * done + grads[0][done:])  # what was not stepped
    optimizer.step()
    run(optimizer, grads[1:])
    run(clean, grads)
    same(params, same_params)


def test_a_sparse_gradient_that_a_later_group_refuses_changes_nothing() -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = ours.Adagrad([{"params": [p]}, {"params": [q], "weight_decay": 0.1}], lr=0.1)
    before = snapshot(optimizer)
    p.grad, q.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse gradients"):
        optimizer.step()
    same(snapshot(optimizer), before)
