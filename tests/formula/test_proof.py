"""Each slope is the derivative of its value, exactly: on the recorded formulas, to 45 digits.

The value's graph is differentiated by the table below, which shares nothing with the formulas' own derivations, and both
are evaluated at random points with mpmath, at 120 digits since differences may cancel. Every branch of every where,
maximum, minimum and abs must have been seen.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import mpmath
import pytest

import torchcalc.functional  # noqa: F401  defines the formulas
from torchcalc.formula import Expression, where
from torchcalc.formula.expression import walk
from torchcalc.formula.pointwise import FORMULAS, Formula

mp = mpmath.mp.clone()
mp.dps = 120
EQUAL, NOTHING = mp.mpf(10) ** -45, mp.mpf(10) ** -100
POINTS = 200

# value of an operation, of numbers; a condition is a bool
VALUES: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "neg": lambda a: -a, "fma": lambda a, b, c: a * b + c, "pow": mp.power, "abs": abs, "sgn": mp.sign, "exp": mp.exp,
    "expm1": lambda a: mp.exp(a) - 1, "log": mp.log, "log1p": lambda a: mp.log(1 + a), "sqrt": mp.sqrt,
    "rsqrt": lambda a: 1 / mp.sqrt(a), "sigmoid": lambda a: 1 / (1 + mp.exp(-a)), "tanh": mp.tanh, "sin": mp.sin,
    "cos": mp.cos, "erf": mp.erf, "erfc": mp.erfc, "maximum": max, "minimum": min, "floor": mp.floor,
    "where": lambda c, a, b: a if c else b, "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": lambda a: not a,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip
# change of an operation, of numbers and their changes
CHANGES: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, da, db: da + db,
    "sub": lambda a, b, da, db: da - db,
    "mul": lambda a, b, da, db: da * b + a * db,
    "div": lambda a, b, da, db: da / b - a * db / b**2,
    "neg": lambda a, da: -da,
    "fma": lambda a, b, c, da, db, dc: da * b + a * db + dc,
    "abs": lambda a, da: da if a > 0 else -da,
    "sgn": lambda a, da: 0,
    "exp": lambda a, da: mp.exp(a) * da,
    "expm1": lambda a, da: mp.exp(a) * da,
    "log": lambda a, da: da / a,
    "log1p": lambda a, da: da / (1 + a),
    "sqrt": lambda a, da: da / (2 * mp.sqrt(a)),
    "sigmoid": lambda a, da: da / (4 * mp.cosh(a / 2) ** 2),
    "tanh": lambda a, da: da / mp.cosh(a) ** 2,
    "erf": lambda a, da: 2 / mp.sqrt(mp.pi) * mp.exp(-a * a) * da,
    "erfc": lambda a, da: -2 / mp.sqrt(mp.pi) * mp.exp(-a * a) * da,
    "maximum": lambda a, b, da, db: da if a > b else db,
    "minimum": lambda a, b, da, db: da if a < b else db,
    "where": lambda c, a, b, dc, da, db: da if c else db,
}


def number(x: float) -> Any:
    """A constant of a formula, exactly: √½ and its like are meant, of which the formula has 16."""
    for name, exact in NAMED.items():
        if x != 0 and abs(float(exact) / x - 1) < 1e-15:
            assert float(exact) == x or abs(float(exact) - x) <= 2 * math.ulp(x), name
            return exact
    return mp.mpf(repr(x)) if math.isfinite(x) else mp.mpf(x)


NAMED = {
    "-√½": -mp.sqrt(mp.mpf(1) / 2), "1/√2π": 1 / mp.sqrt(2 * mp.pi), "√(2/π)": mp.sqrt(2 / mp.pi), "2π": 2 * mp.pi,
    "3·0.044715": 3 * mp.mpf("0.044715"),
}  # fmt: skip


BRANCHES: dict[str, Callable[..., Any]] = {
    "where": lambda c, a, b: c,
    "maximum": lambda a, b: a > b,
    "minimum": lambda a, b: a < b,
    "abs": lambda a: a > 0,
}


def quietly(f: Callable[..., Any], *args: Any) -> Any:
    """nan where there is no real number, as in a branch that is not taken."""
    try:
        y = f(*args)
    except (ZeroDivisionError, ValueError, TypeError):
        return mp.nan
    return mp.nan if isinstance(y, mp.mpc) else y


class Evaluation:
    """Values of expressions at a point, and their derivatives along one input; collects the branches taken."""

    def __init__(self, point: dict[str, Any], along: str, branches: set[tuple[Expression, bool]]) -> None:
        self.point, self.along, self.branches = point, along, branches
        self.values: dict[Expression, Any] = {}
        self.changes: dict[Expression, Any] = {}

    def of(self, root: Expression) -> tuple[Any, Any]:
        for e in walk([root]):
            if e in self.values:
                continue
            a, da = [self.values[c] for c in e.children], [self.changes[c] for c in e.children]
            if e.op in ("input", "parameter"):
                y, dy = self.point[e.args[0]], mp.mpf(e.args[0] == self.along)
            elif e.op == "constant":
                y, dy = number(e.args[0]), mp.mpf(0)
            else:
                y = quietly(VALUES[e.op], *a)
                still = e.is_condition or not any(d != 0 for d in da if d is not None)
                dy = mp.mpf(0) if still else quietly(CHANGES[e.op], *a, *da)
                if e.op in BRANCHES and not e.is_uniform:
                    self.branches.add((e, bool(BRANCHES[e.op](*a))))
            self.values[e], self.changes[e] = y, dy
        return self.values[root], self.changes[root]


# Where a slope is not the derivative, as the formula's file says and torch has it: the input of the slope → the rest.
BOUNDED: dict[tuple[str, str], Callable[[dict[str, Any]], bool]] = {
    ("BCELoss", "q"): lambda p: p["q"] * (1 - p["q"]) > mp.mpf("1e-12"),
    ("GaussianNLLLoss", "var"): lambda p: p["var"] > p["eps"],
}


def some_number(random: random.Random) -> Any:
    """Of many scales, and next to 0 and 1."""
    x = random.choice(
        [
            lambda: random.gauss(0, 1),
            lambda: random.gauss(0, 30),
            lambda: random.random(),
            lambda: 10 ** random.uniform(-60, 0),
            lambda: mp.mpf(1) - mp.power(10, random.uniform(-60, 0)),
        ]
    )()
    return mp.mpf(x)


def differences(f: Formula) -> list[str]:
    """Where a slope is not the derivative, and which branches were not seen."""
    numbers = random.Random(0)
    found: list[str] = []
    branches: set[tuple[Expression, bool]] = set()
    for i, name in enumerate(f.inputs):
        product = f.products[i]
        if product is None:
            continue
        compared = 0
        for _ in range(POINTS):
            point = {n: some_number(numbers) for n in (*f.inputs, "g")}
            point |= {n: mp.mpf(numbers.uniform(0.1, 3)) for n in f.parameters}
            evaluation = Evaluation(point, name, branches)
            point["y"], derivative = evaluation.of(f.expression)
            slope, _ = evaluation.of(product)
            if mp.isnan(point["y"]) or not BOUNDED.get((f.name, name), lambda p: True)(point):
                continue
            compared += 1
            expected = point["g"] * derivative
            if not abs(slope - expected) <= EQUAL * abs(expected) + NOTHING:
                found.append(f"∂{f.name}/∂{name} is {mp.nstr(expected, 12)} and not {mp.nstr(slope, 12)} at {point}")
        if compared < POINTS // 20:
            found.append(f"∂{f.name}/∂{name} was compared at {compared} points only")
    nodes = list(walk([f.expression, *(p for p in f.products if p is not None)]))
    # 0·∞ = 0 (times in expression.py) is no branch of a formula: it is seen at no finite point.
    guards = {c for e in nodes if e.op == "eq" for c in e.children}
    guards |= {e for e in nodes if e.op == "where" and any(c.op == "eq" for c in walk(e.children[:1]))}
    for e in nodes:
        if e.op not in BRANCHES or e.is_uniform or e in guards:
            continue
        found += [f"{f.name}: {e} was never seen {side}" for side in (True, False) if (e, side) not in branches]
    return found


@pytest.mark.parametrize("name", FORMULAS)
def test_every_slope_is_the_derivative(name: str) -> None:
    found = differences(FORMULAS[name])
    assert not found, found[:3]


def formula(value: Callable[..., Any], *slopes: Callable[..., Any]) -> Formula:
    return Formula("Test", value, slopes, tuple("xw"[: len(slopes)]), ())


@pytest.mark.parametrize(
    "wrong",
    [
        formula(lambda x: x * x * x, lambda x: 2 * x * x),
        formula(lambda x: where(x > 0, x, 0.1 * x), lambda x: where(x > 0, 1, 0.2)),  # on one branch
        formula(lambda x: x.sigmoid(), lambda y: y * (1 - y) + 1e-20),  # by less than double precision shows
        formula(lambda x, w: x * w, lambda w: w, lambda w: w),  # of one input
        formula(lambda x: x.abs(), lambda x, g: where(x > 0, g, g)),  # a product
    ],
)
def test_a_wrong_slope_fails(wrong: Formula) -> None:
    assert any("is" in line and "not" in line for line in differences(wrong))


def test_a_branch_that_is_never_seen_fails() -> None:
    hidden = formula(lambda x: where(x > 1e9, x, 2 * x), lambda x: where(x > 1e9, 3, 2))
    assert any("never seen" in line for line in differences(hidden))


def test_right_slopes_pass() -> None:
    assert not differences(
        formula(lambda x, w: where(x > w, x * w, 0), lambda x, w: where(x > w, w, 0), lambda x, w: where(x > w, x, 0))
    )
