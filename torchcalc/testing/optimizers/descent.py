"""It descends: a quadratic, Rosenbrock, in proportion to lr, and up to the stability threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import parting, same_run
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import gradients
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

FACTORS = (1.0, 10.0, 0.1, 100.0, 0.01, 1000.0)


def minimize(
    subject: OptimizerSubject,
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    enough: float,
    **options: Any,
) -> list[float]:
    """The losses on the way down, until one is at most enough of the first."""
    p = nn.Parameter(start.clone())
    optimizer: Any = subject.make([p], **options)
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(p)
        value.backward()
        return value

    for _ in range(steps):
        losses.append(float(closure() if not subject.needs_closure else loss(p)))
        if not math.isfinite(losses[-1]) or losses[-1] <= enough * losses[0]:
            break
        optimizer.step(closure) if subject.needs_closure else optimizer.step()
    return losses


def descend(
    subject: OptimizerSubject, check: str, start: Tensor, loss: Callable[[Tensor], Tensor], steps: int, enough: float
) -> Finding:
    """An error unless some step size near the one given reaches enough of the loss at the start."""
    tried = []
    maximize = {"maximize": False} if subject.defaults.get("maximize") else {}
    for factor in FACTORS if subject.has_lr else (1.0,):
        options = {"lr": subject.lr * factor} if factor != 1 else {}
        losses = minimize(subject, start, loss, steps, enough, **options, **maximize)
        if losses[-1] <= enough * losses[0]:
            at = f" with lr={options['lr']:.4g}" if options else ""
            return Finding(check, figure=f"loss ×{losses[-1] / losses[0]:.1e} in {len(losses) - 1} steps{at}")
        tried.append((options.get("lr", subject.defaults.get("lr")), losses))
    lr, losses = min(tried, key=lambda x: x[1][-1] if math.isfinite(x[1][-1]) else math.inf)
    share = losses[-1] / losses[0]
    if share < 0.9:
        text = f"none of the step sizes brings the loss under {share:.3g} of the start in {steps} steps (slow, or held)"
        return Finding(check, "note", f"loss ×{share:.2g}", text, "descends, but not all the way")
    ascends = all(not math.isfinite(ls[-1]) or ls[-1] >= ls[0] for _, ls in tried)
    still = all(ls[-1] == ls[0] for _, ls in tried)
    return Finding(
        check,
        "error",
        f"loss ×{losses[-1] / losses[0]:.2g}",
        f"of the step sizes {[f'{lr:.4g}' for lr, _ in tried if lr is not None]}, none brings the loss to {enough:g} "
        f"of {losses[0]:.4g} in {steps} steps; the best, lr={lr}, reaches {losses[-1]:.4g}",
        "the loss never changes" if still else "ascends: sign of the update" if ascends else "",
        {"losses": losses[:: max(1, len(losses) // 20)]},
    )


@check("optimizer", "quadratic")
def quadratic(subject: OptimizerSubject) -> Finding:
    """Descends on a quadratic of condition 10."""
    start = subject.parameters()[0].detach()
    curvature = torch.linspace(0.5, 5, start.numel(), dtype=start.dtype).reshape(start.shape)
    return descend(subject, "quadratic", start, lambda p: (curvature * p * p).sum() / 2, 400, 1e-2)


@check("optimizer", "rosenbrock")
def rosenbrock(subject: OptimizerSubject) -> Finding:
    """Descends into and along Rosenbrock's valley."""
    shape = subject.shapes()[0]
    even = shape[-1] // 2 * 2
    start = torch.zeros(shape, dtype=subject.exact)
    start[..., 0:even:2], start[..., 1:even:2] = -1.2, 1.0

    def loss(p: Tensor) -> Tensor:
        x, y = p[..., 0:even:2], p[..., 1:even:2]
        return ((1 - x) ** 2 + 100 * (y - x * x) ** 2).sum()

    return descend(subject, "rosenbrock", start, loss, 1000, 0.2)


@check("optimizer", "step size")
def step_size(subject: OptimizerSubject) -> Finding:
    """The first update is in proportion to lr."""
    params = subject.parameters()
    grads = gradients(params, 1)
    lr = subject.lr
    start, one = subject.trial(params, grads)
    expected = [s + 2 * (p - s) for s, p in zip(start, one, strict=True)]
    _, two = subject.trial(params, grads, lr=2 * lr)
    m = parting([start, expected], [start, two])
    if m is None:
        return Finding("step size", figure="2·lr steps twice as far")
    ratio = m.constant_ratio
    if ratio is not None:
        power = 1 + math.log2(ratio) if ratio > 0 else math.nan
        text = f"with 2·lr the first update is {2 * ratio:.4g} times as long, not twice: {m}"
        if abs(power - 2) < 1e-3:
            return Finding("step size", "error", f"lr^{power:.2f}", text, "lr applied twice", m.details())
        if abs(power) < 1e-3:
            return Finding("step size", "error", "lr^0", text, "lr ignored", m.details())
    return Finding("step size", "note", "not ∝ lr", f"the first update is not in proportion to lr: {m}")


@check("optimizer", "threshold")
def threshold(subject: OptimizerSubject) -> Finding:
    """On a quadratic it converges below the stability threshold and diverges above it."""
    if subject.defaults.get("maximize") or subject.needs_closure:
        raise Skip("it maximizes, or needs a closure")
    if subject.exact != torch.float64:
        raise Skip("it refuses float64")
    lr = subject.lr
    if subject.threshold is None:
        bound, how = _derived(subject, lr)
    else:
        bound, how = subject.threshold, "given"
    for factor, name in ((0.98, "below"), (1.02, "above")):
        curvature = factor * bound / lr
        xs = _orbit(subject, curvature, 1.0, 600)
        early, late = max(map(abs, xs[100:200])), max(map(abs, xs[-100:]))
        converges = late < early or late == 0
        if converges != (factor < 1):
            return Finding(
                "threshold",
                "error",
                f"{how} at lr·λ = {bound:.5g}",
                f"with lr·λ = {factor * bound:.5g}, {name} the {how} threshold {bound:.5g}, it "
                f"{'converges' if converges else 'diverges'}: |x| goes from {early:.3g} to {late:.3g}",
                f"{'converges above' if converges else 'diverges below'} the threshold",
                {"threshold": bound, "early": early, "late": late},
            )
    return Finding("threshold", figure=f"lr·λ = {bound:.5g}, {how}", details={"threshold": bound})


def _orbit(subject: OptimizerSubject, curvature: float, start: float, steps: int) -> list[float]:
    """x after each step on λx²/2."""
    shape = subject.shapes()[0]
    p = nn.Parameter(torch.full(shape, start, dtype=torch.float64))
    optimizer = subject.make([p])
    xs = [start]
    for _ in range(steps):
        p.grad = curvature * p.detach()
        optimizer.step()
        xs.append(float(p.detach().flatten()[0]))
        if not 1e-250 < abs(xs[-1]) < 1e250:
            break
    return xs


def _derived(subject: OptimizerSubject, lr: float) -> tuple[float, str]:
    """lr·λ where the linear recurrence x'' = a·x' + b·x, observed at small λ, loses its stability.

    a and b are affine in λ, as for every method whose steps are a fixed combination of past gradients; the threshold is
    where the larger root of z² = a·z + b leaves the unit circle.
    """
    scales = (0.1 / lr, 0.2 / lr)
    fits = []
    for curvature in scales:
        one, two = _orbit(subject, curvature, 1.0, 20), _orbit(subject, curvature, 2.0, 20)
        play = [[torch.tensor(x, dtype=torch.float64)] for x in one]
        twice = [[torch.tensor(x / 2, dtype=torch.float64)] for x in two]
        if len(one) != len(two) or not same_run(play, twice):
            raise Skip("its step is not linear in the gradient: pass threshold= to check one")
        fits.append(_recurrence(torch.tensor(one, dtype=torch.float64)))
    slope = (fits[1] - fits[0]) / (scales[1] - scales[0])

    def radius(curvature: float) -> float:
        a, b = (fits[0] + slope * (curvature - scales[0])).tolist()
        root = complex(a * a + 4 * b) ** 0.5
        return max(abs(a + root), abs(a - root)) / 2

    low, high = scales[0], scales[0]
    if radius(low) >= 1:
        raise Skip("it does not converge at lr·λ = 0.1")
    while radius(high) < 1:
        high *= 1.5
        if high > 1e6 * scales[0]:
            raise Skip("it has no stability threshold")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if radius(middle) < 1 else (low, middle)
    return lr * low, "derived"


def _recurrence(x: Tensor) -> Tensor:
    """(a, b) of x'' = a·x' + b·x; b is 0 if x' = a·x explains the orbit already."""
    for order in (1, 2):
        rows = torch.stack([x[1:-1], x[:-2]], 1)[:, :order] / x[2:, None]
        ones = torch.ones(len(rows), 1, dtype=x.dtype)
        if bool(rows.isfinite().all()) and float(torch.linalg.cond(rows)) < 1e5:
            fit = torch.linalg.lstsq(rows, ones).solution
            if float((rows @ fit - ones).abs().max()) < 1e-10:
                return torch.nn.functional.pad(fit.flatten(), (0, 2 - order))
    raise Skip("its steps are no linear recurrence of order 1 or 2: pass threshold= to check one")
