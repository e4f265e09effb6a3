"""Richardson differences: right to their error bar, which is small; kinks are seen."""

import math

import pytest
import torch

from torchcalc.testing.differences import element_slopes, slopes_along


@pytest.mark.parametrize(
    ("f", "derivative", "points"),
    [
        (torch.sin, torch.cos, [-3.0, 0.1, 2.0]),
        (torch.exp, torch.exp, [-20.0, 0.0, 5.0]),
        (torch.log, torch.reciprocal, [0.05, 1.0, 1e4]),
        (lambda x: x**5, lambda x: 5 * x**4, [-100.0, 0.3, 7.0]),
        (lambda x: 1e8 + x.tanh(), lambda x: 1 - x.tanh() ** 2, [0.0, 1.0]),  # nearly all digits are rounded away
        (lambda x: x.sin().float(), torch.cos, [0.5, 1.0]),
    ],
)
def test_error_bar_holds(f, derivative, points):
    x = torch.tensor(points, dtype=torch.float64)
    weights = torch.ones_like(f(x))
    slopes = element_slopes(f, x, weights)
    truth = derivative(x)
    assert slopes.usable.all()
    assert bool(((slopes.value - truth).abs() <= 10 * slopes.error + 1e-12 * truth.abs()).all())
    size = f(x).abs().double().sum() * torch.finfo(f(x).dtype).eps
    assert bool((slopes.error <= 1e-9 * truth.abs() + 1e5 * size).all())


@pytest.mark.parametrize(
    ("f", "at"), [(torch.abs, 0.0), (torch.relu, 0.0), (lambda x: x.clamp(max=2), 2.0), (lambda x: (x > 1) * 1.0, 1.0)]
)
def test_kinks_and_jumps(f, at):
    x = torch.tensor([at, at + 0.3, at - 0.3], dtype=torch.float64)
    slopes = slopes_along(f, x, torch.ones_like(x))
    assert slopes.kink.tolist() == [True, False, False]


def test_one_sided_slopes_of_a_kink():
    slopes = slopes_along(torch.relu, torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert (slopes.left.item(), slopes.right.item()) == (0.0, 1.0)


def test_outside_of_the_domain_is_not_usable():
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    slopes = slopes_along(torch.log, x, torch.ones_like(x))
    assert slopes.usable.tolist() == [False, True]


def test_a_function_that_raises_beyond_its_domain():
    def picky(x):
        if (x > 1).any():
            raise ValueError("too large")
        return x**2

    x = torch.tensor([0.99], dtype=torch.float64)
    slopes = slopes_along(picky, x, torch.ones_like(x))
    assert math.isclose(slopes.value.item(), 1.98, rel_tol=1e-9)
