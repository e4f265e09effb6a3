"""Which way a step goes: a kernel takes what it can, the rule takes the rest, and neither holds what others may want."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.cases import CASES, Case, build, each, gradients, parameters, run, same
from torchcalc import native


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
    expected = 3 if native.available() else len(params)
    assert len(seen) == 4 * expected
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
    assert len(seen) == (0 if native.available() else 2 * len(params))
    assert {x.dtype for s in optimizer.state.values() for key, x in s.items() if key not in ("step", "mu_product")} == {
        after
    }


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
