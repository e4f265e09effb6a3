"""Richardson differences: right to their error bar, which is small; kinks are seen."""

import math

import pytest
import torch

from torchcalc.calculus import numeric_derivative
from torchcalc.testing import check_function
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
        (torch.sqrt, lambda x: 0.5 / x.sqrt(), [1e-9, 1e-5, 2.0]),
        (lambda x: 1 / x, lambda x: -1 / x**2, [1e-3, -2e-3, 0.5]),
        (lambda x: (1e4 * x).tanh(), lambda x: 1e4 * (1 - (1e4 * x).tanh() ** 2), [1e-5, -2e-5, 1e-4]),
        (lambda x: (1e4 * x).sin(), lambda x: 1e4 * (1e4 * x).cos(), [0.3, 1.0, -2.0]),
        (lambda x: (50 * x).exp(), lambda x: 50 * (50 * x).exp(), [-2.0, 0.1, 2.0]),
        (lambda x: (x**3).sin(), lambda x: 3 * x**2 * (x**3).cos(), [6.0, -6.0]),
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
    assert bool((slopes.error <= 1e-8 * truth.abs() + 1e5 * size).all())


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


def test_one_engine_for_both():
    """The slopes of the checks are those of numeric_derivative, to the error of either."""
    x = torch.tensor([1e-5, 0.3, 20.0], dtype=torch.float64)
    slopes, found = element_slopes(torch.sqrt, x, torch.ones_like(x)), numeric_derivative(torch.sqrt, x)
    assert bool(((slopes.value - found.value).abs() <= 10 * (slopes.error + found.error)).all())


def test_what_moves_between_all_steps_has_no_usable_slope():
    """Steps from 1e-8 of x cannot follow 1e14 periods in it; an error bar that holds is infinite."""
    x = torch.tensor([0.3, 1.7], dtype=torch.float64)
    slopes = element_slopes(lambda x: (1e14 * x).sin(), x, torch.ones_like(x))
    assert not slopes.usable.any()


def test_nothing_compared_is_not_ok():
    x = torch.tensor([0.3, 1.7])
    report = check_function(lambda x: (1e14 * x).sin(), x, include=["gradient"])
    assert report["gradient"].verdict == "not checked"
    assert report["gradient"].details == {"compared": 0, "elements": 2}
    assert "no difference is exact enough" in str(report)
    compared = check_function(torch.sqrt, torch.tensor([1e-5, 2.0]), include=["gradient"])["gradient"]
    assert compared.verdict == "ok" and compared.figure.startswith("2 of 2 elements")
