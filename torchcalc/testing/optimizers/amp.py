"""GradScaler: gradients are unscaled once, and a step in which one is inf never happened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.optimizers.compare import difference, failed, parting
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, Play, clone, gradients, poisoned, set_gradients
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

SCALE = 2.0**10  # a power of two: unscaling rounds nothing


def scaled_run(subject: OptimizerSubject, grads: Grads, bad: int | None, way: dict[str, Any]) -> Play:
    """Steps by a GradScaler; in step bad the gradient of the last parameter has an inf."""
    params = subject.parameters(torch.float32)
    optimizer = subject.make(params, **way)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=10**6, backoff_factor=0.5)
    seen = [clone(params)]
    for t, step in enumerate(grads):
        scale = float(scaler.scale(torch.ones(())))
        scaled: list[Tensor | None] = [None if g is None else g * scale for g in step]
        if t == bad:
            last = scaled[-1]
            assert last is not None
            last.view(-1)[-1] = torch.inf
        set_gradients(params, scaled)
        scaler.step(optimizer)
        scaler.update()
        seen.append(clone(params))
    return seen


def expected_run(subject: OptimizerSubject, grads: Grads, skip: int | None, way: dict[str, Any]) -> Play:
    """Steps without a scaler; step skip is left out."""
    params = subject.parameters(torch.float32)
    optimizer = subject.make(params, **way)
    seen = [clone(params)]
    for t, step in enumerate(grads):
        if t == skip:
            seen.append(seen[-1])
        else:
            seen += subject.play(optimizer, params, [step])[1:]
    return seen


def without(subject: OptimizerSubject, grads: Grads, skip: int, way: dict[str, Any], zero: bool) -> Play:
    """What a wrong optimizer does in a skipped step: it runs on the gradients (or zeros), and restores the weights."""
    params = subject.parameters(torch.float32)
    optimizer = subject.make(params, **way)
    seen = [clone(params)]
    for t, step in enumerate(grads):
        used: list[Tensor | None] = [torch.zeros_like(p) for p in params] if zero and t == skip else list(step)
        now = subject.play(optimizer, params, [used])[1]
        if t == skip:
            with torch.no_grad():
                for p, old in zip(params, seen[-1], strict=True):
                    p.copy_(old)
            now = clone(params)
        seen.append(now)
    return seen


@check("optimizer", "grad scaler")
def grad_scaler(subject: OptimizerSubject) -> Finding:
    """Under GradScaler it steps by the unscaled gradients, and a step with inf in a gradient changes nothing."""
    if subject.needs_closure:
        raise Skip("GradScaler takes no closure")
    shown = []
    for name, way in subject.each_way():
        params = subject.parameters(torch.float32)
        grads = gradients(params, 5)
        for bad in (None, 0, 1, 4):
            expected = expected_run(subject, grads, bad, way)
            with poisoned():
                found = scaled_run(subject, grads, bad, way)
            m = parting(expected, found)
            if m is None:
                continue
            what = f"GradScaler{name}, {'no inf' if bad is None else f'inf in step {bad + 1}'}"
            scaled = _scaled(grads, bad)
            causes: list[Any] = [("gradients not unscaled", expected_run(subject, scaled, bad, way))]
            if bad is not None:
                causes += [
                    ("step counted in a skipped step", without(subject, grads, bad, way, zero=True)),
                    ("momentum or state updated in a skipped step", without(subject, grads, bad, way, zero=False)),
                ]
                if parting(expected[: bad + 2], found[: bad + 2]) is None:
                    nan = any(bool(x.isnan().any()) for row in found for x in row)
                    kept = "uninitialised state kept by" if nan else "momentum or state updated in"
                    causes.append((f"{kept} a skipped step", found))
            return failed("grad scaler", what, m, causes, found)
        shown.append(name or " given")
    return Finding("grad scaler", figure="inf in step 1, 2, 5")


def _scaled(grads: Grads, bad: int | None) -> Grads:
    """The gradients as the scaler's scale makes them; it halves after the bad step."""
    scales = [SCALE if bad is None or t <= bad else SCALE / 2 for t in range(len(grads))]
    return [[None if g is None else g * scale for g in row] for row, scale in zip(grads, scales, strict=True)]


@check("optimizer", "found_inf")
def found_inf(subject: OptimizerSubject) -> Finding:
    """An optimizer that says it unscales itself leaves weights, state and step alone when found_inf is set."""
    if subject.needs_closure:
        raise Skip("GradScaler takes no closure")
    tested = []
    for name, way in subject.each_way():
        params = subject.parameters(torch.float32)
        optimizer: Any = subject.make(params, **way)
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            continue
        tested.append(name.removeprefix(" with ") or "given")
        for t, bad in enumerate((True, False, True, False)):
            before = clone(params)
            states = {k: x.clone() for k, x in _tensors(optimizer, params).items()}
            optimizer.grad_scale = torch.full((), SCALE)
            optimizer.found_inf = torch.full((), float(bad))
            step: list[Tensor | None] = [torch.full_like(p, torch.inf if bad else SCALE) for p in params]
            set_gradients(params, step)
            with poisoned():
                optimizer.step()
            if not bad:
                continue
            if any(difference(a, b) for a, b in zip(before, params, strict=True)):
                text = f"parameters move in step {t + 1}, which has found_inf=1{name}"
                return Finding("found_inf", "error", "parameters moved", text, "parameters moved in a skipped step")
            for key, x in _tensors(optimizer, params).items():
                old = states.get(key, torch.zeros_like(x))
                if difference(old, x):
                    what = "step counted" if "step" in key else "momentum or state updated"
                    text = (
                        f"state{key} changes by {difference(old, x):.3g} in step {t + 1}, which has found_inf=1{name}"
                    )
                    what = "uninitialised state kept by" if bool(x.isnan().any()) else f"{what} in"
                    return Finding("found_inf", "error", key, text, f"{what} a skipped step")
    if not tested:
        raise Skip("it does not unscale gradients itself")
    return Finding("found_inf", figure=", ".join(tested))


def _tensors(optimizer: torch.optim.Optimizer, params: Any) -> dict[str, Tensor]:
    return {
        f"[{i}][{k!r}]": x
        for i, p in enumerate(params)
        for k, x in optimizer.state.get(p, {}).items()
        if isinstance(x, Tensor)
    }
