"""line_search: the conditions at its steps, recomputed; SciPy's steps; what goes wrong on the way."""

import importlib
import math
import warnings

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from torchcalc.calculus import training_loss
from torchcalc.convergence import SURFACES, line_search
from torchcalc.optim import GradientDescent

HARD = [SURFACES[name] for name in ("rosenbrock", "beale", "himmelblau")]
by_name = pytest.mark.parametrize("surface", SURFACES.values(), ids=lambda s: s.name)


def gradient(f, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def starts(surface, n: int = 60):
    """Random points, and a direction of descent each: minus the gradient, turned a little; of any length or of length 1."""
    generator = torch.Generator().manual_seed(n)
    x0, x1, y0, y1 = surface.bounds
    for i in range(n):
        u = torch.rand(2, generator=generator, dtype=torch.float64)
        x = torch.stack([x0 + (x1 - x0) * u[0], y0 + (y1 - y0) * u[1]])
        g = gradient(surface, x)
        turn = (torch.rand((), generator=generator, dtype=torch.float64) - 0.5) * 2.5  # less than a right angle
        d = -torch.stack([turn.cos() * g[0] - turn.sin() * g[1], turn.sin() * g[0] + turn.cos() * g[1]])
        yield x, d / d.norm() if i % 2 else d


def scipy_search(surface, x: Tensor, d: Tensor, c2: float) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.optimize._linesearch.LineSearchWarning)
        return scipy.optimize.line_search(
            lambda p: float(surface(torch.tensor(p))),
            lambda p: gradient(surface, torch.tensor(p)).numpy(),
            x.numpy(),
            d.numpy(),
            c2=c2,
        )[0]


def low_enough(surface, x, d, step, c1=1e-4):
    return float(surface(x + step * d)) <= float(surface(x)) + c1 * step * float(gradient(surface, x) @ d)


@by_name
@pytest.mark.parametrize("c2", [0.9, 0.1])
def test_strong_wolfe_conditions(surface, c2):
    for x, d in starts(surface):
        found = line_search(surface, x, d, method="strong_wolfe", c2=c2)
        assert found.converged and found.reason == ""
        assert low_enough(surface, x, d, found.step)
        slope = float(gradient(surface, x + found.step * d) @ d)
        assert abs(slope) <= -c2 * float(gradient(surface, x) @ d) * (1 + 1e-12)
        assert found.slope == pytest.approx(slope, rel=1e-9, abs=1e-9)
        assert found.value == float(surface(x + found.step * d)) == float(surface(found.point))


@by_name
def test_no_more_evaluations_than_scipy(surface):
    """And no failures, where SciPy has some."""
    ours, theirs = 0, 0
    for x, d in starts(surface):
        calls = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step, *_ = scipy.optimize.line_search(
                lambda p, calls=calls: (calls.append(1), float(surface(torch.tensor(p))))[1],
                lambda p: gradient(surface, torch.tensor(p)).numpy(),
                x.numpy(),
                d.numpy(),
                c2=0.1,
            )
        found = line_search(surface, x, d, method="strong_wolfe", c2=0.1)
        assert found.converged
        if step is not None:
            ours, theirs = ours + found.evaluations, theirs + len(calls)
    assert ours <= 1.05 * theirs


@pytest.mark.parametrize("surface", HARD, ids=lambda s: s.name)
@pytest.mark.parametrize("c2", [0.9, 0.1])
def test_steps_are_scipys(surface, c2, monkeypatch):
    """All of them, once a slip of SciPy's is copied: its margins change sign, and so vanish, where α_hi < α_lo."""
    module = importlib.import_module("torchcalc.convergence.line_search")

    def between(low, high, other):
        h = high.step - low.step
        a, b = sorted((low.step, high.step))
        u = (high.value - low.value - low.slope * h) / h**2
        guesses = [(0.0, u, 0.1)]
        if other is not None:
            k = other.step - low.step
            cubic = (u - (other.value - low.value - low.slope * k) / k**2) / (h - k)
            guesses.insert(0, (cubic, u - cubic * h, 0.2))
        for cubic, square, margin in guesses:
            j = low.step + module._minimum(low.slope, square, cubic)
            if a + margin * h <= j <= b - margin * h:
                return j
        return low.step + h / 2

    pairs = [(scipy_search(surface, x, d, c2), (x, d)) for x, d in starts(surface)]
    own = [line_search(surface, x, d, method="strong_wolfe", c2=c2).step for _, (x, d) in pairs]
    assert (
        sum(step is not None and math.isclose(step, o, rel_tol=1e-3) for (step, _), o in zip(pairs, own, strict=True))
        > 30
    )
    monkeypatch.setattr(module, "_between", between)
    for step, (x, d) in pairs:
        if step is not None:  # it gives up after 10 steps of zoom
            found = line_search(surface, x, d, method="strong_wolfe", c2=c2)
            assert found.step == pytest.approx(step, rel=0.01)  # its cubic comes from a matrix, less exactly


@by_name
def test_armijo_takes_the_first_of_a_geometric_sequence(surface):
    for x, d in starts(surface):
        found = line_search(surface, x, d, shrink=0.3, step=2.0)
        assert found.converged and found.gradients == 1 and found.slope is None
        trials = [2.0 * 0.3**k for k in range(found.evaluations - 1)]
        assert found.step == pytest.approx(trials[-1])
        assert [low_enough(surface, x, d, t) for t in trials] == [False] * (len(trials) - 1) + [True]
        assert found.value == float(surface(found.point))


def test_armijo_does_not_look_at_c2():
    assert line_search(quadratic, X, D, c1=0.95).step == 2**-4  # (1 − α)² ≤ 1 − 2·0.95·α


@by_name
def test_armijo_agrees_with_scipy_on_the_first_step_and_the_condition(surface):
    for x, d in starts(surface):
        step, *_ = scipy.optimize._linesearch.line_search_armijo(
            lambda p: float(surface(torch.tensor(p))),
            x.numpy(),
            d.numpy(),
            gradient(surface, x).numpy(),
            float(surface(x)),
        )
        found = line_search(surface, x, d)
        assert low_enough(surface, x, d, step) and low_enough(surface, x, d, found.step)
        assert (found.step == 1) == (step == 1)


@by_name
def test_armijo_is_the_step_of_gradient_descent_with_backtracking(surface):
    for x, _ in starts(surface):
        p = nn.Parameter(x.clone())
        optimizer = GradientDescent([p], lr=0.1, backtrack=True)

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            value = surface(p)
            value.backward()
            return value

        optimizer.step(closure)
        found = line_search(surface, x, -gradient(surface, x), step=0.1)
        assert found.step == pytest.approx(0.1 * optimizer.descent.scale, rel=1e-12)


@pytest.mark.parametrize("surface", HARD, ids=lambda s: s.name)
def test_descends_to_a_minimum(surface):
    """BFGS with strong Wolfe steps: what the conditions are for (yᵀs > 0 keeps H positive)."""
    for x, _ in [(torch.tensor(surface.start, dtype=torch.float64), None)]:
        inverse, g = torch.eye(2, dtype=torch.float64), gradient(surface, x)
        for _ in range(100):
            found = line_search(surface, x, -inverse @ g, method="strong_wolfe")
            s, y = found.point - x, gradient(surface, found.point) - g
            assert y @ s > 0
            left = torch.eye(2, dtype=torch.float64) - torch.outer(s, y) / (y @ s)
            inverse = left @ inverse @ left.T + torch.outer(s, s) / (y @ s)
            x, g = found.point, g + y
            if g.norm() < 1e-6:
                break
        assert min((x - torch.tensor(m, dtype=torch.float64)).norm() for m in surface.minima) < 1e-6


def test_far_away_and_very_close():
    for scale in (1e-9, 1e9):
        x = torch.tensor([1.0, -2.0], dtype=torch.float64)
        found = line_search(
            lambda x: (x**2).sum(), x, -2 * scale * x, method="strong_wolfe", c2=0.1, max_evaluations=100
        )
        assert found.converged and 0.3 < found.step * scale < 0.7
    assert line_search(lambda x: (x**2).sum(), x, -2e9 * x, shrink=0.1).converged


def test_exact_on_a_parabola():
    """The second trial is the minimum: the parabola through the first is the function itself."""
    x = torch.tensor([2.0, -1.0], dtype=torch.float64)
    found = line_search(lambda x: 0.5 * (x**2).sum(), x, -8 * x, method="strong_wolfe", c2=1e-3, c1=1e-4)
    assert found.step == pytest.approx(1 / 8, rel=1e-12) and found.evaluations == 3 and found.gradients == 2


@pytest.mark.parametrize("method", ["armijo", "strong_wolfe"])
@pytest.mark.parametrize("outside", [math.inf, math.nan, -math.inf])
def test_the_edge_of_a_domain(method, outside):
    """−log x − x from 1 to the left: beyond 0 there is nothing, not even where the value is −∞."""

    def f(x):
        inside = x.clamp(min=1e-300)
        return torch.where(x > 0, (inside - 0.25) ** 2 - 1e-3 * inside.log(), outside).sum()

    x = torch.tensor([1.0], dtype=torch.float64)
    found = line_search(f, x, torch.tensor([-3.0], dtype=torch.float64), method=method)
    assert found.converged and 0 < float(found.point) < 1 and math.isfinite(found.value)


def test_a_slope_that_is_not_finite():
    """The first trial lands at 0, where √ has a value but no slope."""
    x = torch.tensor([1.0], dtype=torch.float64)
    found = line_search(lambda x: ((x - 0.25) ** 2 - 0.05 * x.sqrt()).sum(), x, -x, method="strong_wolfe")
    assert found.converged and 0 < float(found.point) < 1 and math.isfinite(found.slope)


def test_gives_up_where_f_falls_for_ever():
    x = torch.tensor([1.0], dtype=torch.float64)
    found = line_search(lambda x: -x.sum(), x, torch.ones_like(x), method="strong_wolfe", max_evaluations=9)
    assert not found.converged and found.evaluations == 9 and "9 evaluations" in found.reason
    assert found.step == 2.0**7 and found.value == -(1 + 2.0**7)  # the best so far


KINKS = {
    "absolute value": lambda x: (x - 0.3).abs().sum(),
    "unequal slopes": lambda x: ((x - 0.3).abs() + 3 * (x - 0.3).relu()).sum(),
    "falls without end": lambda x: -((2 - x) ** 3).sum(),
}


@pytest.mark.parametrize("name", KINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gives_up_at_a_kink(name, dtype, scale):
    """Where no step is flat the bracket shrinks to a point, which has the least value."""
    x = torch.ones(1, dtype=dtype)
    found = line_search(
        KINKS[name], x, torch.full_like(x, -scale), method="strong_wolfe", step=1 / scale, c2=0.1, max_evaluations=400
    )
    if name == "falls without end":
        assert not found.converged and found.value < -1e20
    else:
        assert found.point.item() == pytest.approx(0.3, rel=1e-6)
        assert found.converged == (found.slope == 0)  # float32 may land on the kink, where autograd says 0
        assert found.converged or "shrunk to a point, " in found.reason


def test_relu_networks():
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))
        f = training_loss(model, nn.functional.l1_loss, (torch.randn(20, 5), torch.randn(20, 1)))
        d = {k: -g for k, g in torch.func.grad(f)(f.parameters).items()}
        found = line_search(f, f.parameters, d, method="strong_wolfe", c2=0.1, max_evaluations=200)
        assert found.value < f(f.parameters) and (found.converged or "a kink of f" in found.reason)


HIDDEN = {
    "parabola": (lambda x: (x**2).sum() + 1e4, [0.01]),
    "two": (lambda x: 3 * x[0] ** 2 + x[1] ** 2 + 1e4, [0.01, -0.02]),
    "rosenbrock": (lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + 1000, [1.0001, 1.0003]),
}


@pytest.mark.parametrize("method", ["armijo", "strong_wolfe"])
@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("step", [0.1, 1.0, 7.0])
def test_progress_that_rounding_hides(name, method, step):
    """10⁴ + 10⁻⁴ is 10⁴ in float32: values can't tell, slopes can; float64 sees both conditions hold."""
    f, start = HIDDEN[name]
    x = torch.tensor(start)
    d = -gradient(f, x)
    found = line_search(f, x, d, method=method, step=step)
    assert found.converged and found.reason == ""
    x, end, d = x.double(), found.point.double(), d.double()
    slope = gradient(f, x) @ d
    assert f(end) - f(x) <= 0.5e-4 * found.step * slope  # x + αd is rounded to float32
    if method == "strong_wolfe":
        assert abs(gradient(f, end) @ d) <= 0.9 * abs(slope)


@pytest.mark.parametrize("method", ["armijo", "strong_wolfe"])
def test_no_progress_is_measurable(method):
    """A step that changes nothing is none: (1) would compare f(x) with itself."""
    x = torch.ones(2)
    f = lambda x: (x**2).sum() * (x > 0.9).all()  # noqa: E731
    found = line_search(f, x, torch.full((2,), -1e-30), method=method, max_evaluations=20)
    assert not found.converged and found.step == 0 and torch.equal(found.point, x)
    assert found.reason.startswith("no progress is measurable: f changes by less than its rounding, 1e-07 of it")


def test_inference_mode():
    with torch.inference_mode():
        found = line_search(quadratic, torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0]))
    assert found.converged and found.value == 0


def test_gives_up_where_the_gradient_lies():
    class Liar(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return -g.expand(2)

    x = torch.ones(2)
    found = line_search(Liar.apply, x, torch.ones(2), max_evaluations=20)
    assert not found.converged and found.step == 0 and found.value == 2 and found.evaluations == 20
    assert torch.equal(found.point, x)


def test_a_model_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    f = training_loss(model, nn.functional.mse_loss, (torch.randn(8, 3), torch.randn(8, 1)))
    at = f.parameters
    g = torch.func.grad(f)(at)
    for method in ("armijo", "strong_wolfe"):
        found = line_search(f, at, {k: -v for k, v in g.items()}, method=method)
        assert found.converged and found.point.keys() == at.keys()
        assert found.value == float(f(found.point)) < float(f(at))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not v.requires_grad for v in found.point.values())


def test_parameters_and_mixed_dtypes_stay_as_they_are():
    x = {"a": nn.Parameter(torch.tensor([2.0])), "b": torch.tensor([[3.0]], dtype=torch.float64)}
    with torch.no_grad():  # gradients are computed nevertheless
        found = line_search(lambda x: x["a"].sum().double() ** 2 + x["b"].sum() ** 2, x, {"a": -x["a"], "b": -x["b"]})
    assert found.step == 1 and x["a"].item() == 2 and x["a"].grad is None
    assert found.point["a"].dtype == torch.float32 and found.point["b"].dtype == torch.float64


def quadratic(x):
    return (x**2).sum()


X, D = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((quadratic, X, -D), ValueError, r"direction: the slope of f along it is 10 at x, and must be negative"),
        ((quadratic, X, 0 * D), ValueError, "the slope of f along it is 0"),
        ((quadratic, 0 * X, D), ValueError, "the slope of f along it is 0"),
        ((lambda x: torch.tensor(1.0), X, D), ValueError, "the slope of f along it is 0"),
        ((lambda x: (x - 1).sqrt().sum(), X, D), ValueError, "the slope of f along it is nan"),
        ((lambda x: (x - 3).log().sum(), X, D), ValueError, "f: it is nan at x"),
        ((lambda x: x, X, D), ValueError, r"f returned shape \(2,\), torch.float32; it must return a real scalar"),
        ((lambda x: 1.0, X, D), ValueError, "f returned float"),
        ((quadratic, X, {"a": D}), ValueError, "direction: its shapes are {'a'"),
        ((quadratic, X, D[:1]), ValueError, "direction: its shapes"),
        ((quadratic, [X], D), TypeError, "x: a list; pass a tensor or a dict of tensors"),
        ((quadratic, {}, {}), TypeError, "x: a dict; pass a tensor or a dict of tensors, not an empty one"),
        ((quadratic, X.to(torch.complex64), D), TypeError, "x: torch.complex64 is no real variable"),
        ((quadratic, X, 1j * D), TypeError, "direction: torch.complex64 is not real"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        line_search(*arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(method="wolfe"), 'must be "armijo" or "strong_wolfe"'),
        (dict(step=0.0), "step: 0.0; it must be positive"),
        (dict(step=math.nan), "step: nan"),
        (dict(c1=0.95, method="strong_wolfe"), "c1, c2: 0.95, 0.9"),
        (dict(c1=1.0), r"c1: 1.0; it must be in \(0, 1\)"),
        (dict(c2=1.0, method="strong_wolfe"), "c1, c2"),
        (dict(shrink=1.0), "shrink: 1.0"),
        (dict(max_evaluations=1), "max_evaluations: 1"),
    ],
)
def test_options(option, message):
    with pytest.raises(ValueError, match=message):
        line_search(quadratic, X, D, **option)
