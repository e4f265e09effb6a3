"""Derivatives against closed forms, in every form of x, and what has none."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import torchcalc
from tests.calculus.operations import MARKED, SILENT, DetachedSquare, OnceSquare, RaisingSquare, Square
from tests.calculus.test_curvature import differenced, weight_normed
from torchcalc.calculus import (
    derivative,
    directional_derivative,
    gradient,
    hessian,
    hvp,
    jacobian,
    partial,
    training_loss,
)

FUNCTIONS = {
    "square": (lambda x: x**2, lambda x: 2 * x, lambda x: torch.full_like(x, 2)),
    "sin": (torch.sin, torch.cos, lambda x: -torch.sin(x)),
    "exp": (torch.exp, torch.exp, torch.exp),
    "own tanh": (
        torchcalc.functional.tanh,
        lambda x: 1 / torch.cosh(x) ** 2,
        lambda x: -2 * torch.tanh(x) / torch.cosh(x) ** 2,
    ),
    "Function": (Square.apply, lambda x: 2 * x, lambda x: torch.full_like(x, 2)),
    "branch": (
        lambda x: x**3 if x > 0 else -x,
        lambda x: torch.where(x > 0, 3 * x**2, -1.0),
        lambda x: 6 * x * (x > 0),
    ),
    "constant": (lambda x: torch.ones_like(x), torch.zeros_like, torch.zeros_like),
    "whole": (lambda x: x.sum(), torch.ones_like, torch.zeros_like),  # of one variable, whatever it calls
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivative(name: str, device: str) -> None:
    f, first, second = FUNCTIONS[name]
    for x in (torch.tensor(0.7), torch.tensor([[-1.5, 0.3], [2.0, 0.1]])):
        x = x.double().to(device)
        torch.testing.assert_close(derivative(f)(x), first(x))
        torch.testing.assert_close(derivative(derivative(f))(x), second(x))


def test_derivative_of_a_curve() -> None:
    x = torch.linspace(0, 3, 5, dtype=torch.float64)
    velocity = derivative(lambda t: torch.stack([t.cos(), t.sin()]))(x)
    torch.testing.assert_close(velocity, torch.stack([-x.sin(), x.cos()], 1))
    assert derivative(torch.sin)(torch.zeros(0)).shape == (0,)


def test_results_carry_a_graph_only_if_x_does() -> None:
    x = torch.tensor(0.5, requires_grad=True)
    for f in (torch.sin, Square.apply):
        assert not derivative(f)(x.detach()).requires_grad
        assert not gradient(f)(x.detach()).requires_grad
    (second,) = torch.autograd.grad(derivative(torch.sin)(x), x)
    torch.testing.assert_close(second, -torch.sin(x.detach()))


def test_partial() -> None:
    f = lambda x, n, y: x**n * torch.exp(y)  # noqa: E731
    x, y = torch.tensor(1.3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(partial(f, 0)(x, 3, y), 3 * x**2 * y.exp())
    torch.testing.assert_close(partial(f, -1)(x, 3, y), x**3 * y.exp())
    torch.testing.assert_close(partial(partial(f, 0), 2)(x, 3, y), 3 * x**2 * y.exp())
    with pytest.raises(IndexError, match="i: 3; f was called with 3 arguments"):
        partial(f, 3)(x, 3, y)


A = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
QUADRATICS = {
    "torch": lambda x: x @ A.to(x) @ x / 2 + B.to(x) @ x,
    "Function": lambda x: (Square.apply(x) @ A.to(x).diag() + 2 * x[0] * x[1] - 2 * x[1] * x[2]) / 2 + B.to(x) @ x,
}


@pytest.mark.parametrize("name", QUADRATICS)
def test_quadratic(name: str, device: str) -> None:
    f, a, b = QUADRATICS[name], A.to(device), B.to(device)
    x, v = (
        torch.tensor([0.3, -1.0, 2.0], device=device).double(),
        torch.tensor([1.0, 2.0, -1.0], device=device).double(),
    )
    torch.testing.assert_close(gradient(f)(x), a @ x + b)
    torch.testing.assert_close(jacobian(f)(x), a @ x + b)
    torch.testing.assert_close(jacobian(gradient(f))(x), a)
    torch.testing.assert_close(directional_derivative(f, v)(x), (a @ x + b) @ v)
    torch.testing.assert_close(hessian(f)(x), a)
    torch.testing.assert_close(hvp(f, v)(x), a @ v)


def test_jacobian_and_directional_derivative_of_vectors() -> None:
    x, v = torch.tensor([0.5, -2.0]).double(), torch.tensor([3.0, 0.7]).double()
    a, b = x
    expected = torch.stack([torch.stack([b, a]), torch.stack([a.cos(), 0 * a]), torch.stack([0 * a, 2 * b])])
    for square in (torch.square, Square.apply, OnceSquare.apply):
        f = lambda x: torch.stack([x[0] * x[1], x[0].sin(), square(x[1])])  # noqa: B023, E731
        torch.testing.assert_close(jacobian(f)(x), expected)
        torch.testing.assert_close(directional_derivative(f, v)(x), expected @ v)


def test_dicts_of_parameters(device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().to(device)
    x, p = torch.randn(5, 3, device=device).double(), {k: w.detach() for k, w in model.named_parameters()}
    names, sizes = list(p), [w.numel() for w in p.values()]

    def outputs(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, p, x)

    def f(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return outputs(p).square().mean()

    model(x).square().mean().backward()
    for name, g in gradient(f)(p).items():
        torch.testing.assert_close(g, model.get_parameter(name).grad)
    v = {k: torch.randn_like(w) for k, w in p.items()}
    flat = lambda t: torch.cat([t[k].reshape(-1) for k in names])  # noqa: E731
    unflat = lambda u: {k: w.reshape(p[k].shape) for k, w in zip(names, u.split(sizes), strict=True)}  # noqa: E731
    dense = torch.autograd.functional.hessian(lambda u: f(unflat(u)), flat(p))
    torch.testing.assert_close(flat(hvp(f, v)(p)), dense @ flat(v))
    blocks = hessian(f)(p)
    rows = [torch.cat([blocks[i][j].reshape(p[i].numel(), -1) for j in names], 1) for i in names]
    torch.testing.assert_close(torch.cat(rows), dense)
    J = jacobian(outputs)(p)
    assert J["0.weight"].shape == (5, 2, 4, 3)
    contracted = sum((J[k] * v[k]).reshape(5, 2, -1).sum(-1) for k in names)
    torch.testing.assert_close(directional_derivative(outputs, v)(p), contracted)
    assert all(w.grad is not None for w in model.parameters())


@pytest.mark.parametrize("name", SILENT)
def test_a_silently_missing_second_derivative_raises(name: str) -> None:
    square, x = SILENT[name].apply, torch.tensor([1.0, 2.0])
    loss = lambda x: square(x).sum()  # noqa: E731
    inside = lambda x: square(x).square().sum()  # noqa: E731
    torch.testing.assert_close(gradient(loss)(x), 2 * x)
    for f in (loss, inside):
        for second in (hessian(f), hvp(f, torch.ones(2)), jacobian(gradient(f))):
            with pytest.raises(RuntimeError, match="second derivative"):
                second(x)
    with pytest.raises(RuntimeError, match="second derivative"):
        derivative(derivative(square))(x)
    with pytest.raises(RuntimeError, match="second derivative"):  # in the last element only
        derivative(derivative(lambda s: square(s) if s > 0 else s**2))(torch.tensor([-1.0, -2, -3, -4, 1]))
    with pytest.raises(RuntimeError, match="second derivative"):
        jacobian(hessian(inside))(x)
    with pytest.raises(RuntimeError, match="second derivative"):
        directional_derivative(hvp(inside, x), x)(x)
    with pytest.raises(RuntimeError, match="second derivative"):
        partial(partial(lambda x, y: square(x) * y, 0), 0)(x[0], x[1])


NESTED = {
    "jacobian": lambda f, x: jacobian(lambda x: gradient(f)(x))(x),
    "derivative": lambda f, x: derivative(lambda s: 2 * derivative(f)(s))(x),
    "hessian": lambda f, x: jacobian(lambda x: hessian(lambda x: f(x).square())(x))(x),
    "vmap": lambda f, x: torch.func.vmap(hessian(f))(x[None]),
    "jacrev": lambda f, x: torch.func.jacrev(gradient(f))(x),
    "autograd": lambda f, x: torch.autograd.functional.jacobian(gradient(f), x),
    "closure": lambda f, x: jacobian(lambda a: gradient(lambda x: f(x * a))(torch.ones(2)))(x),
    "partial": lambda f, x: partial(lambda x, y: partial(lambda x, y: f(x) * y, 0)(x, y), 0)(x, x[0]),
}


@pytest.mark.parametrize("name", [*MARKED, "DetachedSquare"])
@pytest.mark.parametrize("nested", NESTED)
def test_nested_in_ways_that_hide_it(nested: str, name: str) -> None:
    square = SILENT[name].apply
    with pytest.raises(RuntimeError, match=r"second derivatives are silently missing|override the setup_context"):
        NESTED[nested](lambda x: square(x).sum(), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(
        NESTED[nested](lambda x: (x**3).sum(), torch.tensor([1.0, 2.0])).flatten()[0],
        torch.tensor({"hessian": 120.0 + 96, "derivative": 12.0}.get(nested, 9.0 if nested == "closure" else 6.0)),
    )


def test_own_functions_are_known_inside_vmap() -> None:
    """At a kink differences grow without end: they would contradict, as they do functions of others."""
    loss = torchcalc.nn.L1Loss()
    assert derivative(derivative(lambda d: loss(d, torch.zeros_like(d))))(torch.tensor(0.0).double()) == 0


@pytest.mark.parametrize("name", SILENT)
def test_first_derivatives_where_the_second_is_missing(name: str) -> None:
    square, x = SILENT[name].apply, torch.tensor([1.0, 2.0])
    at = {"x": nn.Parameter(x)}  # as of a model
    found = gradient(lambda p: square(p["x"]).sum())(at)["x"]
    torch.testing.assert_close(found.detach(), 2 * x)
    constant = jacobian(lambda x: gradient(lambda y: square(y).sum())(torch.ones(2)) + x)
    torch.testing.assert_close(constant(x), torch.eye(2))
    if hasattr(SILENT[name], "generate_vmap_rule") and SILENT[name].generate_vmap_rule:
        torch.testing.assert_close(torch.func.vmap(gradient(lambda x: square(x).sum()))(x[None]), 2 * x[None])


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.tensor([1.0, 2.0])
        for f in (torch.square, OnceSquare.apply, Square.apply):
            torch.testing.assert_close(jacobian(f)(x), (2 * x).diag())
        with pytest.raises(RuntimeError, match="second derivative"):
            hessian(lambda x: DetachedSquare.apply(x).sum())(x)


def test_numbers_dicts_and_other_orders() -> None:
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    f = lambda x, c: c * x["a"].square().sum() * x["b"]  # noqa: E731
    torch.testing.assert_close(partial(f, 0)(x, 2.0), {"a": 12 * x["a"], "b": torch.tensor(10.0)})
    assert partial(f, 1)(x, 2.0) == 15
    g = lambda p, c: c * Square.apply(p["a"]).sum()  # noqa: E731
    torch.testing.assert_close(partial(partial(g, 1), 0)(x, 2.0)["a"], 2 * x["a"])
    v = {"b": torch.tensor(1.0), "a": torch.tensor([1, 0])}
    assert directional_derivative(lambda x: f(x, 1.0), v)(x) == 2 * 3 + 5
    assert directional_derivative(torch.square, 1.0)(3.0) == 6
    assert jacobian(lambda x: x[:0])(x["a"]).shape == (0, 2)
    assert jacobian(lambda x: Square.apply(x)[:0])(x["a"]).shape == (0, 2)


def test_what_refuses_says_why() -> None:
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="no second derivative here"):
        hvp(lambda x: RaisingSquare.apply(x).sum(), x)(x)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        gradient(lambda x: (x @ torch.ones(3)).sum())(x)


def test_forward_mode_that_loses_a_tangent_is_not_believed() -> None:
    @torch.library.custom_op("torchcalc_tests::triple", mutates_args=())
    def triple(x: torch.Tensor) -> torch.Tensor:
        return 3 * x

    triple.register_autograd(lambda ctx, grad: 3 * grad)
    x = torch.tensor([1.0, 2.0])
    # torch 2.13's forward mode takes a custom_op for a constant: jvp gives x
    torch.testing.assert_close(directional_derivative(lambda x: triple(x) + x, x)(x), 4 * x)


@pytest.mark.parametrize("name", ["det", "logdet", "slogdet", "solve", "inv"])
@pytest.mark.parametrize("at", ["identity", "random"])
def test_linear_algebra_in_any_nesting(name: str, at: str) -> None:
    """In torch 2.13 forward mode twice, or reverse over forward mode, is wrong for det, torch.func's Hessian at 1 nan."""
    torch.manual_seed(0)
    V, b = torch.randn(2, 3, 3, dtype=torch.float64).unbind()
    f = {
        "det": torch.linalg.det,
        "logdet": lambda X: torch.logdet(X @ X.T + 2 * torch.eye(3, dtype=X.dtype)),
        "slogdet": lambda X: torch.linalg.slogdet(X)[1],
        "solve": lambda X: torch.linalg.solve(X, b).square().sum(),
        "inv": lambda X: torch.linalg.inv(X).sum(),
    }[name]
    X = torch.eye(3, dtype=torch.float64) if at == "identity" else torch.randn(3, 3, dtype=torch.float64)
    h = 1e-3
    stencil = -(f(X + 2 * h * V) + f(X - 2 * h * V)) + 16 * (f(X + h * V) + f(X - h * V)) - 30 * f(X)
    truth = stencil / (12 * h**2)  # up to h⁴
    along = directional_derivative(f, V)
    pair = directional_derivative(lambda X: torch.stack([f(X), -f(X)]), V)
    found = {
        "twice": directional_derivative(along, V)(X),
        "hidden": directional_derivative(lambda X: along(X), V)(X),
        "of two values": directional_derivative(pair, V)(X)[0],
        "in a gradient": (gradient(lambda X: along(X))(X) * V).sum(),
        "in a jacobian": (jacobian(pair)(X)[0] * V).sum(),
        "hvp": (hvp(f, V)(X) * V).sum(),
        "hessian": torch.einsum("ij,ijkl,kl", V, hessian(f)(X), V),
        "derivative": derivative(derivative(lambda t: f(X + t * V)))(torch.zeros(1).double())[0],
    }
    for way, value in found.items():
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-7, msg=lambda text, way=way: f"{way}: {text}")


OUTSIDE = {
    "item": lambda x: torch.tensor([t.item() ** 2 for t in x.reshape(-1)], dtype=x.dtype).sum(),
    "detach": lambda x: (x.detach() ** 2).sum(),
    "data": lambda x: (x.data**2).sum(),
    "NumPy": lambda x: torch.from_numpy(x.detach().reshape(-1).numpy() ** 2).sum(),
    "no_grad": torch.no_grad()(lambda x: (x**2).sum()),
}
SECOND = {
    "hessian": hessian,
    "hvp": lambda f: hvp(f, 1.0),
    "gradient of gradient": lambda f: gradient(gradient(f)),
}
FIRST = {
    "derivative": derivative,
    "gradient": gradient,
    "jacobian": jacobian,
    "directional_derivative": lambda f: directional_derivative(f, 1.0),
    "partial": lambda f: partial(f, 0),
}


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("name", [*FIRST, *SECOND])
def test_a_value_taken_out_of_the_graph(name: str, outside: str) -> None:
    for x in (torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="its value changes with x, but no differentiable operations lead"):
            (FIRST | SECOND)[name](OUTSIDE[outside])(x)
    with pytest.raises(RuntimeError, match="its value changes with x"):
        derivative(OUTSIDE[outside])(torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("name", [*FIRST, *SECOND])
def test_constants_are_constant(name: str) -> None:
    """Also those of a step function, and of random numbers."""
    x = torch.tensor(2.0)
    for f in (lambda x: torch.tensor(3.0), lambda x: (x > 1).float(), lambda x: torch.rand(()) * 0 + torch.rand(())):
        state = torch.get_rng_state()
        assert (FIRST | SECOND)[name](f)(x) == 0
        torch.set_rng_state(state)


@pytest.mark.filterwarnings("ignore:f. differences of gradients are taken. torch's own:UserWarning")
def test_second_derivatives_where_torch_is_wrong() -> None:
    f, at, v = weight_normed(torch.float64)
    truth = differenced(f, at, v)
    H, Hv = hessian(f)(at), hvp(f, v)(at)
    for name, expected in truth.items():
        torch.testing.assert_close(Hv[name], expected, rtol=1e-5, atol=1e-7)
        column = sum(torch.tensordot(H[name][k], v[k], v[k].dim()) for k in v)
        torch.testing.assert_close(column, expected, rtol=1e-5, atol=1e-7)
    with pytest.warns(UserWarning, match="torch's own second derivative is wrong") as caught:
        hvp(f, v)(at)
    assert caught[0].filename == __file__
    name = next(iter(at))
    squared = lambda p: gradient(f)(p)[name].square().sum()  # noqa: E731
    for call in (lambda: gradient(squared)(at), lambda: jacobian(lambda p: gradient(f)(p)[name])(at)):
        with pytest.raises(RuntimeError, match="torch's own second derivative is wrong"):
            call()
    at = {k: w.requires_grad_() for k, w in at.items()}
    with pytest.raises(RuntimeError, match="torch's own second derivative is wrong"):
        hvp(f, v)(at)
    with pytest.raises(RuntimeError, match="torch's own second derivative is wrong"):
        sum(g.square().sum() for g in gradient(f)(at).values()).backward()


def test_half_precision_keeps_its_dtype() -> None:
    x = torch.tensor([0.03, 1.0, 1.0]).half()
    f = lambda x: 4000 * x.prod()  # noqa: E731
    H = 4000 * torch.tensor([[0, 1, 1], [1, 0, 0.03], [1, 0.03, 0]])
    torch.testing.assert_close(hessian(f)(x), H.half(), rtol=2e-3, atol=0)
    torch.testing.assert_close(hvp(f, torch.ones(3))(x), H.sum(1).half(), rtol=2e-3, atol=0)


class Turned(nn.Module):
    """Dropout on an activation whose memory is not in the order of its elements."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.a, self.layout = nn.Linear(6, 8), layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        if self.layout == "transposed":
            return nn.functional.dropout(h.t(), 0.5).t()
        h = h.view(-1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
        return nn.functional.dropout2d(h, 0.5) if self.layout == "channels" else nn.functional.dropout(h, 0.5)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "channels", "transformer"])
def test_the_same_dropout_mask_in_every_derivative(layout: str) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True) if layout == "transformer" else Turned(layout)
    model, x = model.double(), torch.randn(4, 5, 6).double() if layout == "transformer" else torch.randn(4, 6).double()
    f = training_loss(model, lambda y, _: y.square().mean(), (x, x))
    at = f.parameters
    v = {k: torch.randn_like(w) for k, w in at.items()}
    leaves = {k: w.clone().requires_grad_() for k, w in at.items()}
    expected = dict(zip(at, torch.autograd.grad(f(leaves), list(leaves.values())), strict=True))
    for derived in (gradient(f)(at), jacobian(f)(at)):
        for name, g in expected.items():
            torch.testing.assert_close(derived[name], g)
    slope = sum((expected[k] * v[k]).sum() for k in v)
    torch.testing.assert_close(directional_derivative(f, v)(at), slope)
    torch.testing.assert_close(directional_derivative(lambda p: torch.stack([f(p), f(p)]), v)(at)[1], slope)
    for name, w in differenced(f, at, v).items():
        torch.testing.assert_close(hvp(f, v)(at)[name], w, rtol=1e-4, atol=1e-7)


def test_torch_func_goes_through() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    f = lambda x: x.sin().prod()  # noqa: E731
    expected = torch.stack([hessian(f)(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(hessian(f))(x), expected)
    torch.testing.assert_close(torch.func.vmap(hvp(f, torch.ones(3).double()))(x), expected.sum(2))


X = torch.ones(2)
REFUSED = {
    "complex": (lambda: gradient(torch.sum)(torch.ones(2, dtype=torch.complex64)), TypeError, "complex64 is no real"),
    "integer": (lambda: derivative(torch.square)(torch.tensor(3)), TypeError, "int64 is no real"),
    "number": (lambda: derivative(math.sin)(1.0), TypeError, "use torch.sin, not math.sin"),
    "vector": (lambda: gradient(torch.sin)(torch.ones(2)), ValueError, r"shape \(2,\); a gradient needs a scalar"),
    "v": (
        lambda: hvp(torch.sum, torch.ones(3))(torch.ones(2)),
        ValueError,
        r"v: its shapes are \(3,\); those of x are \(2,\)",
    ),
    "direction": (lambda: directional_derivative(torch.sin, 1.0)(torch.ones(2)), ValueError, "v: its shapes are"),
    "text": (lambda: derivative(torch.sin)("x"), TypeError, "x: a str"),
    "dict": (lambda: derivative(torch.sin)({"a": torch.ones(())}), TypeError, "x: a dict"),
    "leaf": (lambda: gradient(torch.sum)({"a": X, "n": torch.tensor(1)}), TypeError, r"x\['n'\]: torch.int64"),
    "None": (lambda: gradient(torch.sum)({"a": X, "n": None}), TypeError, r"x\['n'\]: a NoneType"),
    "complex curve": (lambda: derivative(lambda t: torch.exp(1j * t))(X), TypeError, "f returned torch.complex64"),
    "complex v": (lambda: hvp(torch.sum, 1j * X)(X), TypeError, "v: torch.complex64 is not real"),
    "complex direction": (
        lambda: directional_derivative(lambda x: x["a"].sum(), {"a": 1j * X})({"a": X}),
        TypeError,
        r"v\['a'\]: torch.complex64 is not real",
    ),
    "i": (lambda: partial(torch.add, 0.5), TypeError, "i: 0.5; it must be the number of an argument"),
    "bfloat16": (
        lambda: hessian(lambda x: Square.apply(x).sum())(X.bfloat16()),
        RuntimeError,
        "unchecked: torch.bfloat16 is too coarse for differences of gradients; pass float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
