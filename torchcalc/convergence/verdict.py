"""What a loss curve says about its learning rate, and what the sharpness predicts it will say.

With a step η and a curvature λ plain gradient descent multiplies the error along an eigenvector by 1 − ηλ at every step
(``stability.py``). In units of the limit, r = η/η*, that is 1 − 2r for the sharpest direction:

    r > 1          |1 − 2r| > 1        diverges
    r ≈ 1          1 − 2r ≈ −1         the error changes sign at every step and hardly shrinks: oscillates        (1)
    r < 1          |1 − 2r| < 1        converges, each direction at its own pace
    r·T << 1       (1 − 2r)ᵀ ≈ 1       crawls: T steps move even the sharpest direction by little                 (2)

On a parabola the loss falls steadily for each r < 1, since it is even in the error; a loss with terms of third order
goes up and down near r = 1, where the sharpness of a net often stays by itself (the edge of stability).

The verdict on a curve looks at the curve alone, after smoothing out noise where it has any: with the losses L₀ … L_T,

    diverges      a loss is not finite, or the last ones lie above the first ones;
    oscillates    the curve climbs: the sum of its rises is a large part of the sum of its falls           (3)
    crawls        it has not fallen by half of what it could, and was still falling when it ended;
    converges     otherwise.

Noise rises and falls too. A minibatch curve is therefore judged after averaging over windows of w = T/50 steps, and each
mean yᵢ has an error eᵢ, which second differences of the losses tell, as what is smooth has small ones:

    eᵢ² = mean((L_{t−1} − 2L_t + L_{t+1})²)/6w                                     (4)

A turn counts only if it is larger than that: rises and falls in (3) are those of a curve z with play, which stays where
it is as long as y is near,

    zᵢ = the point of [yᵢ − 4eᵢ, yᵢ + 4eᵢ] that is nearest to zᵢ₋₁.                 (5)

Reference: Cohen et al. 2021, arXiv:2103.00065 (the edge of stability).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Label", "Verdict", "predict", "verdict"]

Label = Literal["crawls", "converges", "oscillates", "diverges"]

CLIMB = 0.1  # rises over falls, beyond which a curve oscillates
HALF = 0.5  # of the first loss above the floor: a curve that ends higher crawls if it is still falling
STILL_FALLING = (
    0.075  # of the whole fall, at least, lies between the last two quarters of the curve: ¼ on a straight line
)
PLAY = 4.0  # errors: twice that is the least turn that counts
CRAWL = 0.02  # r·T below which a run is predicted to crawl
EDGE = 0.9  # r from which a run is predicted to oscillate: the error shrinks by less than a fifth a step


@dataclass(frozen=True)
class Verdict:
    """What a loss curve says.

    Attributes:
        label: "crawls", "converges", "oscillates" or "diverges".
        reason: the evidence, in words and numbers.
        fell: by how much the loss fell, as a fraction of the first one above the floor; negative if it rose.
        climbs: the sum of all rises over the sum of all falls, of those that stand out from noise; >= 0.
        diverged_at: the step of the first loss that is not finite, or None.

    >>> found = verdict([4.0, 2.0, float("inf"), float("nan")])
    >>> found.label, found.diverged_at
    ('diverges', 2)
    """

    label: Label
    reason: str
    fell: float
    climbs: float
    diverged_at: int | None = None

    def __str__(self) -> str:
        return f"{self.label}: {self.reason}"


def verdict(losses: Sequence[float] | Tensor, *, floor: float = 0.0, window: int | None = None) -> Verdict:
    """Whether a run crawls, converges, oscillates or diverges, from its loss curve.

    Args:
        losses: one number a step (or an epoch), at least 4; nan and inf mean divergence.
        floor: the least the loss can be, 0 for most.
        window: steps to average over, >= 1; 1 for a curve without noise: of full batches, or of means over epochs. By default
            a fiftieth of the steps, and at least 1.

    Raises:
        ValueError: fewer than 4 losses, or a window that leaves fewer than 4.

    >>> verdict([8.0, 4.0, 2.0, 1.0, 0.5, 0.25]).label
    'converges'
    >>> print(verdict([1.0, 2.0, 4.0, 8.0]))
    diverges: the loss rose from 1 to 8
    """
    curve = torch.as_tensor(losses, dtype=torch.float64, device="cpu").detach().flatten() - floor
    n = curve.numel()
    window = max(n // 50, 1) if window is None else window
    if window < 1 or n // window < 4:
        raise ValueError(f"losses: {n} of them in windows of {window}; at least 4 windows are needed")
    broken = (~curve.isfinite()).nonzero()
    if broken.numel():
        step = int(broken[0])
        return Verdict("diverges", f"the loss is not finite from step {step} on", -math.inf, math.inf, step)
    smooth, steady, play = _without_noise(curve, window)
    first, last = float(smooth[0]), float(smooth[-1])
    change = steady.diff()
    rises, falls = float(change.clamp(min=0).sum()), -float(change.clamp(max=0).sum())
    climbs = rises / falls if falls else (math.inf if rises else 0.0)
    fell = (first - last) / max(abs(first), 1e-300)
    quarter = smooth.numel() // 4
    late = float(smooth[-2 * quarter : -quarter].mean() - smooth[-quarter:].mean())
    if max(rises, falls) <= play:
        return Verdict("crawls", f"nothing stands out from the noise in {n} steps", fell, climbs)
    if climbs > 1 and float(steady[-1]) > first + 1e-9 * abs(first):
        return Verdict("diverges", f"the loss rose from {first + floor:.3g} to {last + floor:.3g}", fell, climbs)
    if climbs > CLIMB:
        return Verdict("oscillates", f"of what it fell it climbed back {climbs:.0%} on its way", fell, climbs)
    if fell < 1 - HALF and late >= STILL_FALLING * (first - last):
        return Verdict("crawls", f"the loss fell by {fell:.1%} in {n} steps, and was still falling", fell, climbs)
    return Verdict("converges", f"the loss fell by {fell:.1%} in {n} steps", fell, climbs)


def _without_noise(curve: Tensor, window: int) -> tuple[Tensor, Tensor, float]:
    """Means over windows, the same with play (5), and the play; without a window nothing is noise."""
    if window == 1:
        return curve, curve, 0.0
    count = curve.numel() // window
    smooth = curve[: count * window].view(count, window).mean(1)
    turns = (curve[:-2] - 2 * curve[1:-1] + curve[2:]).square()
    play = [
        PLAY * math.sqrt(float(turns[max((i - 2) * window, 0) : (i + 3) * window].mean()) / (6 * window))
        for i in range(count)
    ]  # (4), from five windows around each
    steady = smooth.tolist()
    for i in range(1, count):
        steady[i] = min(max(steady[i - 1], steady[i] - play[i]), steady[i] + play[i])  # (5)
    return smooth, torch.tensor(steady, dtype=curve.dtype, device="cpu"), sum(play) / count


def predict(lr: float, limit: float, steps: int) -> Verdict:
    """What the sharpness says a run will do, by equations (1) and (2).

    Args:
        lr: the learning rate, > 0.
        limit: of :func:`stability_limit`, where the run starts.
        steps: that the run takes, >= 1.

    Raises:
        ValueError: an argument out of range.

    >>> [predict(lr, limit=0.2, steps=100).label for lr in (1e-6, 0.1, 0.19, 0.3)]
    ['crawls', 'converges', 'oscillates', 'diverges']
    """
    for name, value in (("lr", lr), ("limit", limit)):
        if not value > 0:
            raise ValueError(f"{name}: {value}; it must be positive")
    if steps < 1:
        raise ValueError(f"steps: {steps}; it must be at least 1")
    r = lr / limit
    if r > 1:
        return Verdict("diverges", f"lr is {r:.3g} times the limit", -math.inf, math.inf)
    fell = 1 - (1 - 2 * r) ** (2 * steps)  # of the loss in the sharpest direction
    if r > EDGE:
        return Verdict("oscillates", f"lr is {r:.3g} of the limit: each step overshoots by {2 * r - 1:.0%}", fell, 0.0)
    if r * steps < CRAWL:
        return Verdict("crawls", f"lr is {r:.2g} of the limit: too little for {steps} steps", fell, 0.0)
    return Verdict("converges", f"lr is {r:.2g} of the limit", fell, 0.0)
