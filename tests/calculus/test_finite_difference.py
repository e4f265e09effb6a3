"""Differences against closed forms: the value, and whether the error estimate is honest."""

import math

import pytest
import torch

from torchcalc.calculus import numeric_derivative, secant_table

SMOOTH = {
    "square": (lambda x: x**2, lambda x: 2 * x, [3.0, 0.0, -1e3]),
    "sin": (torch.sin, torch.cos, [0.0, 1.0, 100.0, 1e4, 1e6]),
    "fast sine": (lambda x: torch.sin(50 * x), lambda x: 50 * torch.cos(50 * x), [0.0, 0.3, 1.0]),
    "exp": (torch.exp, torch.exp, [0.0, 1.0, -30.0, 50.0, 700.0]),
    "log near its edge": (torch.log, lambda x: 1 / x, [1e-12, 1e-8, 3e-8, 1e-7, 1e-3, 0.01, 1.0, 1e5]),
    "math.log": (math.log, lambda x: 1 / x, [0.01, 3.0]),
    "sqrt": (torch.sqrt, lambda x: 0.5 / x.sqrt(), [1e-4, 0.01, 2.0]),
    "pole": (lambda x: 1 / x, lambda x: -1 / x**2, [0.01, 0.3, -4.0]),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, [0.0, 1.0, 20.0]),
    "tenth power": (lambda x: x**10, lambda x: 10 * x**9, [0.0, 0.1, 7.0]),
    "offset": (lambda x: 3 * x + 1e6, lambda x: 0 * x + 3, [0.0, 1.0, 1e4]),
    "constant": (lambda x: 1.0, lambda x: 0 * x, [0.0, 2.0]),
    "narrow bell": (lambda x: torch.exp(-100 * x**2), lambda x: -200 * x * torch.exp(-100 * x**2), [0.0, 0.05, 1.0]),
    "tiny scale": (lambda x: torch.sin(1e8 * x), lambda x: 1e8 * torch.cos(1e8 * x), [1e-8, -3e-8]),
    "cancellation": (lambda x: (1 - torch.cos(x)) / x**2, None, [0.5, 0.01]),
    "|x|³": (lambda x: x.abs() ** 3, lambda x: 3 * x * x.abs(), [0.0, 0.01]),
    "beside a kink": (torch.relu, lambda x: (x > 0).double(), [1e-9, 1e-7, 1e-3, -0.003, 0.2]),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_error_estimate_is_honest_and_small(name: str) -> None:
    f, slope, xs = SMOOTH[name]
    x = torch.tensor(xs, dtype=torch.float64)
    if name == "cancellation":  # sin(x)/x² − 2(1 − cos x)/x³ loses digits itself; its series does not
        expected = sum((-1) ** k * 2 * k * x ** (2 * k - 1) / math.factorial(2 * k + 2) for k in range(1, 8))
    else:
        expected = slope(x)
    found = numeric_derivative(f, x)
    rounding = 4 * torch.finfo(x.dtype).eps * expected.abs()  # of the closed form
    assert ((found.value - expected).abs() <= 2 * found.error + rounding).all(), (found, expected)
    tight = {"cancellation": 1e-4, "offset": 1e-7, "sin": 1e-8}.get(name, 1e-8)
    assert (found.error <= tight * expected.abs().clamp(min=1)).all(), found


def test_low_precision_inside_is_noticed() -> None:
    x = torch.tensor([0.3, 1.0, 2.0])
    found = numeric_derivative(lambda x: torch.sin(x.float()), x)
    gap = (found.value - torch.cos(x.double())).abs()
    assert (gap <= 2 * found.error).all() and (found.error > 1e-9).all() and (found.error < 1e-2).all()


def test_kinks_and_jumps() -> None:
    kink = numeric_derivative(abs, 0.0)
    assert kink.error >= 1 and abs(kink.value) <= 1  # any slope in [−1, 1] is as good
    assert numeric_derivative(torch.relu, 0.0).error >= 0.5
    assert numeric_derivative(torch.sign, 0.0).error > 1
    assert numeric_derivative(torch.sqrt, 0.0).value.isnan()  # no left side
    assert numeric_derivative(torch.sqrt, 0.0).error == math.inf


def test_shapes_and_calls() -> None:
    calls = []
    found = numeric_derivative(lambda t: calls.append(t) or torch.stack([t.cos(), t.sin()]), torch.tensor([[0.0, 1.0]]))
    x = torch.tensor([[0.0, 1.0]]).double()
    torch.testing.assert_close(found.value, torch.stack([-x.sin(), x.cos()], 2))
    assert found.value.shape == found.error.shape == found.step.shape == (1, 2, 2)
    assert found.evaluations == len(calls)
    assert str(numeric_derivative(lambda x: 2 * x, 1.0)).startswith("2 ± ")


def test_secants_tend_to_the_slope_until_rounding_wins() -> None:
    table = secant_table(lambda x: x**2, 3.0)
    at = {row.h: row for row in table.rows}
    assert f"{at[0.01].x:.4g} {at[0.01].y:.6g} {at[0.01].slope:.6g}" == "3.01 9.0601 6.01"
    errors = [abs(row.slope - 6) for row in table.rows]
    assert errors[:6] == pytest.approx([row.h for row in table.rows[:6]], rel=1e-3)  # x²: the slope is 6 + h
    assert min(errors) < 1e-6 < 1e-4 < errors[-1]
    lines = str(table).split("\n")
    assert lines[0] == "f(3) = 9" and lines[4].split() == ["0.01", "3.01", "9.0601", "6.01"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_one_sided_secants() -> None:
    assert [row.slope for row in secant_table(abs, 0.0, steps=(0.5, -0.5)).rows] == [1, -1]


REFUSED = {
    "integer": (lambda: numeric_derivative(torch.sin, torch.tensor(1)), TypeError, "int64 is no real"),
    "complex": (lambda: numeric_derivative(torch.sin, torch.tensor(1j)), TypeError, "is no real"),
    "nan": (lambda: numeric_derivative(torch.sin, math.nan), ValueError, "x: nan must be finite"),
    "empty": (lambda: numeric_derivative(torch.sin, torch.zeros(0)), ValueError, "at least one element"),
    "complex value": (lambda: numeric_derivative(lambda x: x * 1j, 1.0), ValueError, "f returned torch.complex128"),
    "zero step": (lambda: secant_table(torch.sin, 1.0, steps=(0.0,)), ValueError, "steps: 0.0 does not change x"),
    "tiny step": (lambda: secant_table(torch.sin, 1.0, steps=(1e-17,)), ValueError, "1e-17 does not change x = 1.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
