"""Verdicts on runs whose truth is known: gradient descent on quadratics, with and without noise, and what is no run."""

import math

import pytest
import torch

from torchcalc.convergence import predict, verdict

CURVATURES = torch.logspace(-1, 0, 8, dtype=torch.float64)  # the limit of gradient descent is 2


def descend(lr, steps=200, momentum=0.0, noise=0.0, seed=0):
    """Losses of (stochastic) gradient descent with momentum on ½Σλx²."""
    generator = torch.Generator().manual_seed(seed)
    x, m, losses = torch.ones(8, dtype=torch.float64), 0.0, []
    for _ in range(steps):
        loss = (CURVATURES * x**2).sum() / 2
        losses.append(float(loss) * (1 + noise * float(torch.randn((), generator=generator))))
        m = momentum * m + CURVATURES * x
        x = x - lr * m
    return losses


@pytest.mark.parametrize(
    ("lr", "label"),
    [
        (1e-6, "crawls"),
        (1e-4, "crawls"),
        (0.05, "converges"),
        (0.5, "converges"),
        (1.7, "converges"),
        (2.05, "diverges"),
        (9.0, "diverges"),
    ],
)
def test_gradient_descent(lr, label):
    assert verdict(descend(lr), window=1).label == label
    assert predict(lr, 2.0, 200).label == label


def test_momentum_rings():
    found = verdict(descend(0.5, momentum=0.95), window=1)
    assert found.label == "oscillates"
    assert found.climbs > 0.1


def test_a_limit_cycle_oscillates():
    assert verdict([1.0, 0.3, 0.8, 0.2, 0.7, 0.3, 0.8, 0.2, 0.7, 0.2]).label == "oscillates"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("lr", "label"), [(0.05, "converges"), (2.1, "diverges")])
def test_noise_of_minibatches_is_no_oscillation(lr, label, seed):
    assert verdict(descend(lr, steps=1000 if lr < 2 else 200, noise=0.05, seed=seed)).label == label


SHAPES = {  # of t in [0, 1], and what they are
    "floor": (lambda t: 0.1 + 2.2 * torch.exp(-15 * t), "converges"),
    "high floor": (lambda t: 1.4 + 0.9 * torch.exp(-15 * t), "converges"),
    "slow": (lambda t: 2.3 * torch.exp(-3 * t), "converges"),
    "straight": (lambda t: 2.3 * (1 - 0.3 * t), "crawls"),
    "still": (lambda t: 2.3 + 0 * t, "crawls"),
    "rings": (lambda t: 0.2 + torch.exp(-2 * t) * (1 + torch.cos(12 * math.pi * t)), "oscillates"),
    "bounces": (lambda t: 1 + 0.5 * torch.sin(20 * math.pi * t), "oscillates"),
    "climbs": (lambda t: 2.3 * (1 + 2 * t**2), "diverges"),
    "explodes": (lambda t: 2.3 * torch.exp(4 * t), "diverges"),
}


@pytest.mark.parametrize(
    ("noise", "steps"),
    [(n, t) for t in (300, 1000) for n in ("none", "5 % of the loss", "0.2")] + [("20 % of the loss", 1000)],
)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_through_noise(name, noise, steps):
    """Of 40 seeds at most one is mistaken."""
    curve, label = SHAPES[name]
    y, wrong = curve(torch.arange(steps, dtype=torch.float64) / steps), []
    size = {"none": 0 * y, "5 % of the loss": 0.05 * y, "20 % of the loss": 0.2 * y, "0.2": 0.2}[noise]
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        found = verdict(y + size * torch.randn(steps, generator=generator, dtype=torch.float64)).label
        wrong += [found] * (found != label)
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_not_finite(broken):
    found = verdict([1.0, 0.5, broken, 0.1, 0.1])
    assert (found.label, found.diverged_at) == ("diverges", 2)
    assert "from step 2 on" in str(found)


def test_floor_counts():
    """A loss that stops at its floor has converged, however little it fell."""
    losses = [2.0 + 0.1 * 0.8**t for t in range(60)]
    assert verdict(losses, floor=2.0).label == "converges"
    assert verdict(losses, floor=2.0).fell == pytest.approx(1, abs=1e-3)
    assert verdict([3.0 - 1e-4 * t for t in range(60)]).label == "crawls"


def test_negative_losses():
    """A log-likelihood may be below zero."""
    assert verdict([-1.0, -2.0, -2.5, -2.8, -2.9, -2.95, -2.97, -2.97]).label == "converges"
    assert verdict([-1.0, 1.0, 3.0, 9.0]).label == "diverges"


def test_predicted_fall_is_that_of_the_sharpest_direction():
    x = torch.ones((), dtype=torch.float64)
    for _ in range(10):
        x = x - 0.3 * x
    assert predict(0.3, 2.0, 10).fell == pytest.approx(1 - float(x) ** 2)


def test_edge():
    assert predict(1.9, 2.0, 100).label == "oscillates"
    assert "1.05 times" in predict(2.1, 2.0, 100).reason


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: verdict([1.0, 2.0]), "losses: 2 of them"),
        (lambda: verdict([1.0] * 10, window=3), "windows of 3"),
        (lambda: predict(0.0, 1.0, 5), "lr: 0"),
        (lambda: predict(1.0, -1.0, 5), "limit: -1"),
        (lambda: predict(1.0, 1.0, 0), "steps: 0"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
