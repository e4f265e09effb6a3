"""GradScaler: a step that overflows changes nothing, another is unscale_ and a step; gradients stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.cases import (
    CASES,
    Case,
    build,
    each,
    each_config,
    gradients,
    has_tensors,
    parameters,
    same,
    set_gradients,
    snapshot,
)
from torchcalc import optim as ours
from torchcalc.optim.extras import Scaling
from torchcalc.optim.tensor_list import TensorList

FUSED = tuple(case for case in CASES if case.takes("fused"))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # GradScaler knows no complex gradients


def scaler_of(scale: float) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    scaler.scale(torch.ones(()))  # makes the scale
    return scaler


def scaled(grads: list[Tensor | None], scale: float) -> list[Tensor | None]:
    return [None if g is None else g * scale for g in grads]


@each()
def test_only_fused_says_that_it_unscales(case: Case) -> None:
    """With the attribute Lightning refuses gradient_clip_val under 16-mixed, so nobody has it who did not ask."""
    for options in ({}, dict(foreach=False), dict(fused=False), dict(fused=None)):
        if all(case.takes(option) for option in options):
            assert not hasattr(case.cls(parameters(), lr=0.1, **options), "_step_supports_amp_scaling")
    if case.takes("fused"):
        assert case.cls(parameters(), lr=0.1, fused=True)._step_supports_amp_scaling is True


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("fused", [True, False])
@each_config(FUSED)
def test_an_overflow_changes_nothing(case: Case, config: dict[str, Any], fused: bool, bad: float, first: int) -> None:
    """At the first step, where there is no state yet, or later; the steps after it go as if it had never been."""
    params, calm = parameters(), parameters()
    optimizer, other = build(case.cls, params, config, fused=fused), build(case.cls, calm, config, fused=fused)
    scaler, calm_scaler = scaler_of(1024.0), scaler_of(1024.0)
    for step, grads in enumerate(gradients(params, 5, missing=False)):
        if step == first:
            for i in range(2):
                set_gradients(params, scaled(grads, 1024.0))
                params[i].grad.view(-1)[-1] = bad
                held = [p.grad.clone() for p in params]
                before, weights = snapshot(optimizer), [p.detach().clone() for p in params]
                scaler.step(optimizer)
                scaler.update(1024.0)
                same([p.detach() for p in params], weights)
                same(_state(optimizer), _state_of(before))
                if fused:
                    same([p.grad for p in params], held)
        for ps, o, s in ((params, optimizer, scaler), (calm, other, calm_scaler)):
            set_gradients(ps, scaled(grads, 1024.0))
            s.step(o)
            s.update(1024.0)
    same(snapshot(optimizer), snapshot(other))


def _state(optimizer: Any) -> Any:
    return optimizer.state_dict()["state"]


def _state_of(seen: Any) -> Any:
    return seen["optimizer"]["state"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [65536.0, 1000.0])
@each_config(FUSED)
def test_a_scaled_step_is_unscale_and_then_step(
    case: Case, config: dict[str, Any], scale: float, dtype: torch.dtype
) -> None:
    """To the last bit, also where the scale is no power of two: torch multiplies by a rounded 1/scale, and so do we.

    In bfloat16 unscale_ rounds the gradient to bfloat16; a kernel may skip that rounding.
    """
    params, plain = parameters(dtype), parameters(dtype)
    optimizer, other = build(case.cls, params, config, fused=True), build(case.cls, plain, config)
    scaler, unscaler = scaler_of(scale), scaler_of(scale)
    for grads in gradients(params, 3, missing=False):
        set_gradients(params, scaled(grads, scale))
        held = [p.grad.clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        same([p.grad for p in params], held)
        set_gradients(plain, scaled(grads, scale))
        unscaler.unscale_(other)
        other.step()
        unscaler.update()
    if dtype == torch.bfloat16:
        torch.testing.assert_close(params, plain, rtol=2**-7, atol=2**-8)
    else:
        same(params, plain)
        same(_state(optimizer), _state(other))
    assert not hasattr(optimizer, "grad_scale")


@each_config(FUSED)
def test_float16_gradients_are_unscaled_inside(case: Case, config: dict[str, Any]) -> None:
    """GradScaler.unscale_ refuses float16; a fused step takes it. The scale, 65536, is inf in float16."""
    params, wide = parameters(torch.float16), parameters(torch.float32)
    for p, q in zip(params, wide, strict=True):
        q.data.copy_(p)
    optimizer, exact = build(case.cls, params, config, fused=True), build(case.cls, wide, config)
    scaler = scaler_of(65536.0)
    grads = gradients(params, 1, missing=False)[0]
    set_gradients(params, [None if g is None else (g.clamp(-0.9, 0.9) * 65504) for g in grads])
    set_gradients(wide, [p.grad.float() / 65536 for p in params])
    scaler.step(optimizer)
    exact.step()
    for p, q in zip(params, wide, strict=True):
        torch.testing.assert_close(p.float(), q, rtol=2**-9, atol=2**-10)


@each(FUSED)
def test_unscaled_by_hand_and_clipped_first(case: Case) -> None:
    """The documented way to clip: unscale_, clip_grad_norm_, step; grad_scale is then None."""
    params, plain = parameters(), parameters()
    optimizer, other = (build(case.cls, ps, case.configs[0], fused=f) for ps, f in ((params, True), (plain, None)))
    scaler = scaler_of(512.0)
    for grads in gradients(params, 3, missing=False):
        set_gradients(params, scaled(grads, 512.0))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        set_gradients(plain, grads)
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        other.step()
    same(params, plain)


@each(FUSED)
def test_every_path_unscales(case: Case) -> None:
    """A group that says foreach=True or False in an optimizer with fused=True is unscaled as well."""
    params, plain = parameters(), parameters()
    options: list[dict[str, Any]] = [{}, dict(foreach=False), dict(fused=False)]
    groups = [dict(params=params[i::3], **option) for i, option in enumerate(options)]
    order = params[0::3] + params[1::3] + params[2::3]
    optimizer = build(case.cls, groups, case.configs[0], fused=True)
    other = build(case.cls, plain, case.configs[0])
    scaler = scaler_of(256.0)
    for _ in range(2):
        for p, q in zip(params, plain, strict=True):
            p.grad, q.grad = torch.full_like(p, 256.0 * 0.3), torch.full_like(q, 0.3)
        scaler.step(optimizer)
        scaler.update()
        other.step()
    assert len(order) == len(params)
    torch.testing.assert_close(params, plain, rtol=1e-6, atol=0)


def test_a_factor_on_the_device_keeps_the_dtype_of_0d_gradients() -> None:
    """torch promotes a 0-dimensional tensor by another one: lerp_ would then refuse the gradient."""
    g = torch.tensor(3.0, dtype=torch.bfloat16)
    scaling = Scaling(coefficient=torch.tensor(0.5))
    same(scaling.direction(g), torch.tensor(1.5, dtype=torch.bfloat16))
    same(scaling.direction(TensorList([g, g])).tensors, [torch.tensor(1.5, dtype=torch.bfloat16)] * 2)
    same(g, torch.tensor(3.0, dtype=torch.bfloat16))


def test_a_disabled_scaler_is_no_scaler() -> None:
    params, plain = parameters(), parameters()
    grads = gradients(params, 1)[0]
    for ps, scaler in ((params, torch.amp.GradScaler("cpu", enabled=False)), (plain, None)):
        optimizer = ours.AdamW(ps, fused=True)
        set_gradients(ps, grads)
        scaler.step(optimizer) if scaler else optimizer.step()
    same(params, plain)
    assert not has_tensors({})
