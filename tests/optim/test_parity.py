"""Every optimizer against its twin in torch.optim, or against the float64 textbook where torch has none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from tests.native.reference import exact_sqrt
from tests.optim.cases import (
    CASES,
    DEVICES,
    DTYPES,
    NUMBERS,
    TWINS,
    Case,
    build,
    each,
    each_config,
    each_path,
    gradients,
    has_tensors,
    parameters,
    run,
    same,
    set_gradients,
    ulp,
)

STEPS = 25
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the tables' rows for cuda are left out")
def test_the_tables_have_rows_for_cuda() -> None:
    assert "cuda" in DEVICES


LOOP: dict[str, Any] = dict(foreach=False)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in HALVES], ids=str)
@each_config(TWINS)
def test_loop_equals_torch_bit_for_bit(case: Case, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Missing gradients, late first ones, 0-d and empty parameters are among them."""
    assert case.twin is not None
    mine, theirs = parameters(dtype), parameters(dtype)
    a, b = build(case.cls, mine, config, **LOOP), build(case.twin, theirs, config, **LOOP)
    grads = gradients(mine, STEPS)
    for step in grads:
        run(a, [step])
        run(b, [step])
        same(mine, theirs)
    same(a.state_dict(), b.state_dict())
    assert not all(torch.equal(p, q) for p, q in zip(mine, parameters(dtype), strict=True))


@each_config(TWINS)
def test_loop_equals_torch_in_groups_with_their_own_options(case: Case, config: dict[str, Any]) -> None:
    assert case.twin is not None
    own: list[dict[str, Any]] = [dict(lr=0.003), dict(weight_decay=0.2, maximize=True), {}]
    if "betas" in config:
        own[2] = dict(betas=(0.3, 0.6))
    if "momentum" in config:
        own[2] = dict(momentum=0.0, nesterov=False)

    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [dict(params=params[i::3], **options) for i, options in enumerate(own)]

    mine, theirs = parameters(), parameters()
    a, b = build(case.cls, groups(mine), config, **LOOP), build(case.twin, groups(theirs), config, **LOOP)
    order = mine[0::3] + mine[1::3] + mine[2::3]
    grads = gradients(order, STEPS)
    run(a, grads)
    run(b, grads)
    same(mine, theirs)
    same(a.state_dict(), b.state_dict())


def _metric(step: int) -> float:
    return [3.0, 2.0, 2.5, 2.6, 2.7, 1.0][step % 6]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 5, 0.3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(o, 20)], [5]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1, cycle_momentum=cycles_momentum(o)),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 3, cycle_momentum=cycles_momentum(o)),
}


def cycles_momentum(optimizer: Any) -> bool:
    return optimizer.defaults.get("momentum", 0) != 0 or "betas" in optimizer.defaults


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each(TWINS)
def test_loop_equals_torch_under_schedulers(case: Case, scheduler: str, tensor_lr: bool) -> None:
    assert case.twin is not None
    config: dict[str, Any] = dict(lr=torch.tensor(0.01) if tensor_lr else 0.01)
    if case.takes("momentum"):
        config["momentum"] = 0.9
    ends = []
    for cls in (case.cls, case.twin):
        params = parameters()
        optimizer = build(cls, params, config, **LOOP)
        schedule = SCHEDULERS[scheduler](optimizer)
        rates = []
        for step, grads in enumerate(gradients(params, STEPS)):
            run(optimizer, [grads])
            schedule.step(*([_metric(step)] if scheduler == "ReduceLROnPlateau" else []))
            rates.append(float(optimizer.param_groups[0]["lr"]))
        assert len(set(rates)) > 2
        ends.append((params, optimizer.state_dict(), schedule.state_dict()["_last_lr"], rates))
    same(*ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_path(TWINS)
def test_every_path_is_within_one_ulp_a_step(
    case: Case,
    config: dict[str, Any],
    dtype: torch.dtype,
    options: dict[str, Any],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step from one state: along our path, along torch's loop, and along torch's loop in float64, the truth.

    The truth has correctly rounded roots. Those of torch in float64 are off by an ulp on some processors, and Adadelta
    squares what it makes of two of them.

    Paths round in another order. Ours errs by at most one ulp of the weight (of the state) more than torch's loop does.
    """
    assert case.twin is not None
    if "fused" in options and dtype.is_complex:
        return  # refused, as torch does: test_errors.py
    params = parameters(dtype, device)
    warm = build(case.twin, params, config, **LOOP)
    run(warm, gradients(params, 8))
    grads = gradients(params, 1, seed=2, missing=False)

    def stepped(cls: Any, hyper: dict[str, Any], to: torch.dtype, at: str = device, **options: Any) -> Any:
        copies = [p.detach().to(at, to, copy=True).requires_grad_() for p in params]
        optimizer = build(cls, copies, hyper, **options)
        for p, copied in zip(params, copies, strict=True):
            optimizer.state[copied] = {
                key: x.to(at, copy=True) if key in NUMBERS else x.to(at, to, copy=True)
                for key, x in warm.state[p].items()
            }
        run(optimizer, [[g.to(at, to) for g in step if g is not None] for step in grads])
        return [p.cpu() for p in copies], [{k: x.cpu() for k, x in optimizer.state[p].items()} for p in copies]

    wide = torch.complex128 if dtype.is_complex else torch.float64
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "sqrt", exact_sqrt)
        patch.setattr(Tensor, "sqrt_", lambda x: x.copy_(exact_sqrt(x)))
        truth, truth_state = stepped(case.twin, plain(config), wide, "cpu", **LOOP)
    theirs, their_state = stepped(case.twin, config, dtype, **LOOP)
    mine, my_state = stepped(case.cls, config, dtype, **options)
    for i, p in enumerate(params):
        near(p.cpu(), mine[i], theirs[i], truth[i])
        assert my_state[i].keys() == their_state[i].keys()
        for key, exact in truth_state[i].items():
            if exact.dim() or key != "step":
                before = warm.state[p].get(key, exact)
                if key == "ax":  # it becomes the weight, with whose unit the weight may err
                    before = torch.maximum(before.abs(), p.detach().abs()) if not p.is_complex() else before
                near(before.cpu(), my_state[i][key], their_state[i][key], exact)
            else:
                same(my_state[i][key], their_state[i][key])


def near(old: Tensor, mine: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """The largest error of mine, in ulp of its size before or after, is at most that of theirs, and one more."""
    if truth.is_complex():
        return near(*map(torch.view_as_real, (old, mine, theirs, truth)))
    assert mine.dtype == theirs.dtype
    unit = ulp(torch.maximum(old.double().abs(), truth.abs()).to(mine.dtype))
    # Before torch 2.13 Adam's, NAdam's and RMSprop's loops in float16 make infinities: where both have one, nothing is wrong.
    error, allowed = (torch.where(x == truth, 0.0, (x.double() - truth).abs() / unit) for x in (mine, theirs))
    if truth.numel() and not error.max() <= allowed.max() + 1:
        at = int(error.nan_to_num(torch.inf).argmax())
        values = [float(x.flatten()[at].detach()) for x in (mine, theirs, truth, old)]
        raise AssertionError(f"{error.max()} ulp, theirs {allowed.max()}; mine, theirs, truth, old: {values}")


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters as numbers."""

    def number(x: Any) -> Any:
        return tuple(map(number, x)) if isinstance(x, tuple) else x.item() if isinstance(x, Tensor) else x

    return {k: number(v) for k, v in config.items()}


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@each_path()
def test_halves_are_rounded_once(
    case: Case, config: dict[str, Any], options: dict[str, Any], device: str, dtype: torch.dtype, layout: str
) -> None:
    """Along every path the new weight and state are those of float64, to the nearest: half an ulp, and float32's error."""

    def stored(x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=-1)[..., 0] if layout == "strided" else x.clone()

    start = parameters(dtype, device)
    first, second = gradients(start, 2, missing=False)
    grads = [[g.mul(1e-3) for g in step if g is not None] for step in (first, second)]  # squares of 1e-6, and smaller
    mine = [torch.nn.Parameter(stored(p.detach())) for p in start]
    optimizer = build(case.cls, mine, config, **options)
    for p, g in zip(mine, grads[0], strict=True):
        p.grad = stored(g)
    optimizer.step()
    old = [p.detach().double() for p in mine]
    exact = [torch.nn.Parameter(p.clone()) for p in old]
    truth = build(case.cls, exact, config, foreach=False)
    for p, q in zip(mine, exact, strict=True):
        truth.state[q] = {
            k: x.clone() if x.dtype == torch.float32 else x.double() for k, x in optimizer.state[p].items()
        }
        q.grad = None
    for p, q, g in zip(mine, exact, grads[1], strict=True):
        p.grad, q.grad = stored(g), g.double()
    optimizer.step()
    truth.step()
    for p, q, before in zip(mine, exact, old, strict=True):
        pairs = [(p, q), *((optimizer.state[p][k], x) for k, x in truth.state[q].items() if x.dtype == torch.float64)]
        for found, right in pairs:
            right = right.detach()
            error = (found.detach().double() - right).abs()
            size = torch.maximum(right.abs(), (right - before).abs()) if found is p else right.abs()
            assert (error <= 0.5 * ulp(right.to(dtype)) + 1e-5 * size).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [dict(foreach=False), dict(foreach=True), {}], ids=str)
@each_config(tuple(case for case in CASES if case.reference is not None))
def test_equals_the_textbook(case: Case, config: dict[str, Any], options: dict[str, Any], device: str) -> None:
    assert case.reference is not None
    params = parameters(torch.float64, device)
    grads = gradients(params, STEPS)
    optimizer = build(case.cls, params, config, **options)
    expected = [
        case.reference(
            np.asarray(p.detach().cpu()),
            [None if g[i] is None else np.asarray(g[i].cpu()) for g in grads],
            **plain(config),
        )
        for i, p in enumerate(params)
    ]
    run(optimizer, grads)
    for p, e in zip(params, expected, strict=True):
        # A step rounds a handful of times, each by at most eps of the weight or of the step; tensors are float32.
        eps = torch.finfo(torch.float32 if has_tensors(config) else torch.float64).eps
        np.testing.assert_allclose(
            p.detach().cpu().numpy(), e, rtol=0, atol=8 * STEPS * eps * (1 + abs(e).max(initial=0))
        )


@each()
def test_mixed_dtypes_and_late_parameters_share_one_optimizer(case: Case) -> None:
    """float32, bfloat16, float64 and complex side by side go as each alone."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]
    alone = []
    for dtype in dtypes:
        params = parameters(dtype)
        run(build(case.cls, params, case.configs[0]), gradients(params, 9))
        alone.append(params)
    together = [parameters(dtype) for dtype in dtypes]
    grads = [list(chain.from_iterable(steps)) for steps in zip(*(gradients(ps, 9) for ps in together), strict=True)]
    run(build(case.cls, list(chain.from_iterable(together)), case.configs[0]), grads)
    same(together, alone)


@each(TWINS)
def test_default_dtype_float64_makes_torchs_step(case: Case) -> None:
    assert case.twin is not None
    torch.set_default_dtype(torch.float64)
    try:
        ends = []
        for cls in (case.cls, case.twin):
            params = parameters()
            optimizer = build(cls, params, case.configs[0], **LOOP)
            run(optimizer, gradients(params, 3))
            ends.append(optimizer.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    same(*ends)


@each_path()
def test_gradients_are_never_written(case: Case, config: dict[str, Any], options: dict[str, Any], device: str) -> None:
    params = parameters(device=device)
    optimizer = build(case.cls, params, config, **options)
    for step in gradients(params, 3, missing=False):
        set_gradients(params, step)
        held = [p.grad for p in params]
        versions = [g._version for g in held if g is not None]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, held, strict=True))
        assert [g._version for g in held if g is not None] == versions
        same([p.grad for p in params], step)
