"""Curvature against closed forms and dense Hessians; and where there is no second derivative."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchcalc
from tests.calculus.operations import WITHOUT, DetachedSoftmaxLoss, OnceSoftmaxLoss, OnceSquare, Square
from torchcalc.calculus import Curvature, curvature, curvature_along, hvp, training_loss


def quadratic(eigenvalues: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """½xᵀHx with these eigenvalues, and the eigenvectors."""
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0].to(eigenvalues)
    return lambda x: (eigenvalues * (Q.T @ x) ** 2).sum() / 2, Q


SPECTRA = {
    "separated": torch.linspace(0, 10, 60),
    "one": torch.tensor([3.0]),
    "two": torch.tensor([-4.0, 2.0]),
    "negative": -torch.linspace(1, 5, 40),
    "largest in size is negative": torch.cat([torch.linspace(-50, 0, 50), torch.tensor([4.0])]),
    "double": torch.tensor([1.0, 7.0, 7.0] + 20 * [0.5]),
    "low rank": torch.cat([torch.zeros(50), torch.tensor([2.0, 5.0])]),
    "identity": torch.ones(30),
    "close": torch.cat([torch.rand(200), torch.tensor([1.03, 1.05])]),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectra(name: str, dtype: torch.dtype, device: str) -> None:
    eigenvalues = SPECTRA[name].to(device, dtype)
    f, Q = quadratic(eigenvalues)
    found = curvature(f, torch.randn(len(eigenvalues), dtype=dtype, device=device), max_products=300)
    largest = float(eigenvalues.max())
    assert found.converged and found.method == "exact" and found.reason == ""
    noise = 1e3 * torch.finfo(dtype).eps * float(eigenvalues.abs().max())
    assert abs(found.value - largest) <= found.residual + noise
    assert found.residual <= 1e-3 * abs(largest) + noise
    H = Q @ eigenvalues.diag() @ Q.T
    assert found.vector.norm().item() == pytest.approx(1, rel=1e-5)
    assert (
        H @ found.vector - found.value * found.vector
    ).norm() <= 2 * found.residual + noise  # the residual is honest


def test_tolerance_and_restarts() -> None:
    f, _ = quadratic(torch.cat([torch.linspace(0, 1, 300), torch.tensor([1.01])]).double().round(decimals=6))
    x = torch.zeros(301).double()
    found = curvature(f, x, tolerance=1e-8, max_products=1000)
    assert found.converged and found.products > 48  # more than one restart
    assert found.value == pytest.approx(1.01, abs=1e-12)  # its error is of the order of the residual squared
    short = curvature(f, x, max_products=5)
    assert not short.converged and short.products == 5 and "not converged" in str(short)
    assert 0 < short.value < 1.01 and short.residual > 1e-3


def test_warm_start_is_cheap_and_not_fooled() -> None:
    n = 3000
    eigenvalues = torch.cat([0.3 * torch.rand(n - 2), torch.tensor([1.0, 1.2])])
    f = lambda x: (eigenvalues * x**2).sum() / 2  # noqa: E731
    cold = curvature(f, torch.ones(n))
    warm = curvature(f, torch.ones(n), start=cold.vector)
    assert warm.converged and warm.products <= cold.products and warm.vector @ cold.vector > 0.99
    overtaken = torch.eye(n)[-2]  # an eigenvector, but no longer of the largest eigenvalue
    found = curvature(f, torch.ones(n), start=overtaken)
    assert found.value == pytest.approx(1.2, rel=1e-3)


@pytest.mark.parametrize(("top", "bulk"), [(1.05, 0.3), (1.1, 0.3), (1.1, 0.9), (1.2, 0.9)])
def test_an_overtaken_eigenvector_among_many(top: float, bulk: float) -> None:
    n = 10**5
    eigenvalues = torch.cat([bulk * torch.rand(n - 2), torch.tensor([1.0, top])])
    overtaken = (torch.arange(n) == n - 2).float()
    found = curvature(lambda x: (eigenvalues * x**2).sum() / 2, torch.ones(n), start=overtaken)
    assert found.value == pytest.approx(top, rel=1e-3)


def model_loss(device: str, activation: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(5, 7), activation, nn.LayerNorm(7), nn.Linear(7, 3)).to(device).double()
    return model, torch.randn(24, 5, device=device).double(), torch.randint(3, (24,), device=device)


def dense(f: Callable[[dict[str, Tensor]], Tensor], p: dict[str, Tensor]) -> Tensor:
    names, sizes = list(p), [w.numel() for w in p.values()]

    def flat_f(u: Tensor) -> Tensor:
        return f({k: w.reshape(p[k].shape) for k, w in zip(names, u.split(sizes), strict=True)})

    return torch.autograd.functional.hessian(flat_f, flat(p))


def flat(p: dict[str, Tensor]) -> Tensor:
    return torch.cat([w.reshape(-1) for w in p.values()])


MODELS = {
    "torch": (nn.Tanh(), nn.functional.cross_entropy),
    "torchcalc": (torchcalc.nn.Tanh(), torchcalc.functional.cross_entropy),
    "gelu": (torchcalc.nn.GELU(), torchcalc.functional.cross_entropy),
    "relu": (nn.ReLU(), nn.functional.cross_entropy),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_against_the_dense_hessian(name: str, device: str) -> None:
    activation, loss = MODELS[name]
    model, x, y = model_loss(device, activation)
    f = training_loss(model, loss, [(x[:10], y[:10]), (x[10:], y[10:])])
    p = f.parameters
    H = dense(f, p)
    found = curvature(f, p, tolerance=1e-6)
    assert found.method == "exact"
    assert found.value == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-9)
    assert curvature_along(f, p, found.vector) == pytest.approx(found.value, rel=1e-9)
    v = {k: torch.randn_like(w) for k, w in p.items()}
    expected = flat(v) @ H @ flat(v) / (flat(v) @ flat(v))
    assert curvature_along(f, p, v) == pytest.approx(expected.item(), rel=1e-9)
    metric = {k: torch.rand_like(w) + 0.1 for k, w in p.items()}
    scale = flat(metric).rsqrt()
    preconditioned = curvature(f, p, metric=metric, tolerance=1e-6)
    expected = torch.linalg.eigvalsh(scale[:, None] * H * scale)[-1]
    assert preconditioned.value == pytest.approx(expected.item(), rel=1e-9)
    again = curvature(f, p, metric=metric, start=preconditioned.vector)
    assert again.value == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_differences_where_there_is_no_second_derivative(name: str, dtype: torch.dtype) -> None:
    square, x = WITHOUT[name].apply, torch.tensor([0.5, -1.0, 2.0], dtype=dtype)
    for f, expected in (
        (lambda x: square(x).sum(), 2.0),
        (lambda x: square(square(x)).sum(), 12 * 4.0),  # x⁴
        (lambda x: 3 * x.square().sum() + 50 * square(x[0]), 106.0),  # a share is missing
        (lambda x: 100 * x.square().sum() + square(x).sum(), 202.0),  # a hundredth of it
    ):
        with pytest.warns(UserWarning, match="by differences of gradients") as caught:
            found = curvature(f, x, tolerance=1e-4)
        assert caught[0].filename == __file__
        assert found.method == "differences" and "by differences of gradients" in str(found)
        assert found.value == pytest.approx(expected, rel=3e-3 if dtype == torch.float32 else 1e-6)
        with pytest.warns(UserWarning, match="by differences of gradients"):
            along = curvature_along(f, x, found.vector)
        assert along == pytest.approx(expected, rel=3e-3 if dtype == torch.float32 else 1e-6)


def test_a_right_function_of_ones_own_is_exact() -> None:
    found = curvature(lambda x: Square.apply(Square.apply(x)).sum(), torch.tensor([0.5, 2.0]))
    assert found.method == "exact" and found.value == pytest.approx(48)


@pytest.mark.parametrize("name", WITHOUT)
def test_one_element_of_many(name: str) -> None:
    """H = I + 4e₀e₀ᵀ: to a random vector the 4 hardly contributes."""
    f = lambda x: x.square().sum() / 2 + 2 * WITHOUT[name].apply(x[:1]).sum()  # noqa: E731
    with pytest.warns(UserWarning, match="by differences of gradients"):
        assert curvature(f, torch.randn(2000)).value == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize("loss", [OnceSoftmaxLoss, DetachedSoftmaxLoss])
def test_hand_written_loss_with_weight_decay(loss: type[torch.autograd.Function]) -> None:
    """The decay's share of a product is exact, and far larger than that of the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    batch = torch.randn(128, 32), torch.randint(10, (128,))
    stock, own = (training_loss(model, each, batch) for each in (nn.functional.cross_entropy, loss.apply))
    decay = lambda p: 0.1 * sum(w.square().sum() for w in p.values())  # noqa: E731
    expected = curvature(lambda p: stock(p) + decay(p), stock.parameters)
    with pytest.warns(UserWarning, match="second derivatives are silently missing"):
        found = curvature(lambda p: own(p) + decay(p), own.parameters)
    assert found.value == pytest.approx(expected.value, rel=2e-3)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_right_functions_are_not_suspected(activation: type[nn.Module]) -> None:
    class Right(OnceSoftmaxLoss):
        @staticmethod
        def backward(ctx, grad):
            x, y = ctx.saved_tensors
            return grad * (x.softmax(1) - nn.functional.one_hot(y, x.shape[1])) / len(x), None

    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 10))
        f = training_loss(model, Right.apply, (torch.randn(256, 32), torch.randint(10, (256,))))
        assert curvature(f, f.parameters, max_products=1).method == "exact"


def weight_normed(
    dtype: torch.dtype,
) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(normed(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    f = training_loss(model, nn.functional.mse_loss, (torch.randn(8, 3).to(dtype), torch.randn(8, 1).to(dtype)))
    at = f.parameters
    return f, at, {name: torch.randn_like(w) for name, w in at.items()}


def differenced(
    f: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor], v: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Hv by a difference of gradients in float64."""

    def slope(h: float) -> list[Tensor]:
        xs = [(w + h * v[name]).requires_grad_() for name, w in at.items()]
        return list(torch.autograd.grad(f(dict(zip(at, xs, strict=True))), xs))

    return {k: (a - b) / 2e-5 for k, a, b in zip(at, slope(1e-5), slope(-1e-5), strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_torch_is_wrong_differences_are_taken(dtype: torch.dtype) -> None:
    """torch 2.13's second derivative of weight_norm is not that of its gradient: gradgradcheck fails."""
    f, at, v = weight_normed(torch.float64)
    truth = differenced(f, at, v)
    along = float(flat(truth) @ flat(v) / (flat(v) @ flat(v)))
    columns = [differenced(f, at, unit) for unit in units(at)]
    largest = torch.linalg.eigvalsh(torch.stack([flat(column) for column in columns]))[-1].item()
    accuracy = 1e-6 if dtype == torch.float64 else 3e-3
    f, at, _ = weight_normed(dtype)
    v = {name: w.to(dtype) for name, w in v.items()}
    message = "taken by differences of gradients: torch's own second derivative is wrong"
    with pytest.warns(UserWarning, match=message):
        assert curvature_along(f, at, v) == pytest.approx(along, rel=accuracy)
    with pytest.warns(UserWarning, match=message):
        found = curvature(f, at, tolerance=1e-3)
    assert found.method == "differences" and found.value == pytest.approx(largest, rel=accuracy)


def units(at: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    size = sum(w.numel() for w in at.values())
    pieces = [row.split([w.numel() for w in at.values()]) for row in torch.eye(size, dtype=torch.float64)]
    return [{k: p.view_as(w) for (k, w), p in zip(at.items(), each, strict=True)} for each in pieces]


def test_kinks_are_no_mistake_of_torch() -> None:
    """Beside them differences are an average, which no second derivative equals: there symmetry decides."""
    torch.manual_seed(0)
    pool = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
    models = {
        "convolution": (nn.Sequential(pool, nn.Linear(72, 10)), (2000, 1, 12, 12)),
        "mlp": (nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)), (5000, 32)),
        "abs": (nn.Sequential(nn.Linear(8, 8), nn.Hardtanh(), nn.Softshrink(), nn.Linear(8, 10)), (300, 8)),
    }
    for model, shape in models.values():
        f = training_loss(model, nn.functional.cross_entropy, (torch.randn(shape), torch.randint(10, shape[:1])))
        found = curvature(f, f.parameters, max_products=2)
        assert found.method == "exact" and found.reason == ""


@pytest.mark.parametrize("only_half", [False, True])
def test_an_overflow_in_float16_on_the_way(only_half: bool) -> None:
    x = torch.tensor([0.03, 1.0, 1.0]).half()

    def f(x: Tensor) -> Tensor:
        if only_half and x.dtype != torch.float16:
            raise RuntimeError("expected scalar type Half")
        return 4000 * x.prod()

    truth = torch.linalg.eigvalsh(torch.autograd.functional.hessian(lambda x: 4000 * x.prod(), x.double()))[-1].item()
    found = curvature(f, x)
    assert found.value == pytest.approx(truth, rel=0.02 if only_half else 1e-3)
    assert found.vector.dtype == torch.float16
    assert bool(found.reason) == only_half  # in float32 it was checked


def test_sparse_gradients() -> None:
    dense, y = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10)), torch.arange(10)
    sparse = nn.Sequential(nn.Embedding(10, 4, sparse=True), dense[1])
    sparse[0].weight = dense[0].weight
    found, expected = (
        curvature(f, f.parameters).value
        for f in (training_loss(model, nn.functional.cross_entropy, (y, y.flip(0))) for model in (sparse, dense))
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_bfloat16_is_believed_and_says_so() -> None:
    x = torch.tensor([1.0, 2.0]).bfloat16()
    for f, expected in ((lambda x: 3 * x.sum(), 0.0), (lambda x: Square.apply(x).sum(), 2.0)):
        found = curvature(f, x)
        assert found.value == pytest.approx(expected, rel=0.01) and found.method == "exact"
        assert "unchecked: torch.bfloat16 is too coarse" in found.reason and "exact: unchecked" in str(found)
        assert found.residual >= torch.finfo(torch.bfloat16).eps * found.value  # what its rounding hides


@pytest.mark.parametrize("x", [1e30, 1e38, math.inf, math.nan])
@pytest.mark.parametrize("own", [Square, OnceSquare])
def test_what_overflows_contradicts_nothing(own: type[torch.autograd.Function], x: float) -> None:
    """As where a training diverged: differences are not finite there, whatever the second derivative is."""
    f = lambda x: (own.apply(x) ** 2).sum()  # noqa: E731
    at = torch.tensor([x, 2 * x])
    if own is OnceSquare:  # what is marked is known without them
        with pytest.warns(UserWarning, match="is marked with once_differentiable"):
            assert math.isnan(curvature(f, at).value)
        return
    found = curvature(f, at)
    assert math.isnan(found.value) and found.method == "exact"
    assert found.reason == "unchecked: differences of gradients overflow"
    with pytest.raises(RuntimeError, match="unchecked: differences of gradients overflow; pass x nearer to 0"):
        hvp(f, torch.ones(2))(at)


def test_hand_written_loss_on_a_relu_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = torch.randn(256, 32), torch.randint(10, (256,))
    stock = training_loss(model, nn.functional.cross_entropy, (x, y))
    once = training_loss(model, OnceSoftmaxLoss.apply, (x, y))
    exact = curvature(stock, stock.parameters)
    with pytest.warns(UserWarning, match="second derivatives are silently missing"):
        found = curvature(once, once.parameters)
    assert exact.method == "exact" and found.method == "differences"
    assert found.value == pytest.approx(exact.value, rel=0.3)  # averaged over kinks; silently it would be far off


def test_no_curvature_is_zero_and_exact() -> None:
    w = torch.randn(4, 3)
    for f in (lambda x: (w @ x).sum(), lambda x: torch.relu(w @ x + 1).sum()):
        found = curvature(f, torch.randn(3))
        assert (found.value, found.converged, found.method) == (0, True, "exact")


def test_attention_and_compiled_functions() -> None:
    q = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    f = lambda q: nn.functional.scaled_dot_product_attention(q, q, q).square().sum()  # noqa: E731

    def textbook(q: Tensor) -> Tensor:
        return ((q @ q.mT / math.sqrt(8)).softmax(-1) @ q).square().sum()

    found, expected = curvature(f, q, tolerance=1e-6), curvature(textbook, q, tolerance=1e-6)
    assert found.method == "exact" and found.value == pytest.approx(expected.value, rel=1e-9)


@pytest.mark.slow
def test_compiled_functions_have_no_second_derivative() -> None:
    x = torch.tensor([0.5, 1.0, -0.3, 2.0])
    compiled = torch.compile(lambda x: x.sin().square().sum(), backend="aot_eager")
    with pytest.warns(UserWarning, match="double backward"):
        found = curvature(compiled, x)
    assert found.value == pytest.approx(float((2 * torch.cos(2 * x)).max()), rel=1e-3)


def test_reproducible_and_generators() -> None:
    f, _ = quadratic(torch.rand(100))
    state = torch.get_rng_state()
    a, b = curvature(f, torch.zeros(100)), curvature(f, torch.zeros(100))
    assert a.value == b.value and torch.equal(a.vector, b.vector) and torch.equal(state, torch.get_rng_state())
    other = curvature(f, torch.zeros(100), generator=torch.Generator().manual_seed(7))
    assert other.value != a.value and other.value == pytest.approx(a.value, rel=1e-3)


def test_works_under_no_grad_and_inference_mode() -> None:
    f = lambda x: (x**4).sum()  # noqa: E731
    x = torch.tensor([1.0, 2.0])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert curvature(f, x).value == pytest.approx(48)
    assert x.grad is None


def test_what_is_not_finite_is_nan() -> None:
    found = curvature(lambda x: (x.log() ** 2).sum(), torch.tensor([1.0, 0.0]))
    assert isinstance(found, Curvature) and math.isnan(found.value) and not found.converged


X = torch.ones(3)
REFUSED = {
    "vector": (lambda: curvature(torch.sin, X), ValueError, r"f returned shape \(3,\)"),
    "independent": (lambda: curvature(lambda x: X.sum(), X), ValueError, "does not depend on `at`"),
    "integer": (lambda: curvature(torch.sum, torch.ones(3, dtype=torch.int64)), TypeError, "at: torch.int64"),
    "complex": (lambda: curvature(torch.sum, {"w": X * 1j}), TypeError, r"at\['w'\]: torch.complex64"),
    "empty": (lambda: curvature(torch.sum, torch.ones(0)), ValueError, "at: it has no elements"),
    "list": (lambda: curvature(torch.sum, [X]), TypeError, "at: a list"),
    "start": (lambda: curvature(torch.sum, X, start=torch.ones(2)), ValueError, "start: its shapes are"),
    "zero start": (lambda: curvature(torch.sum, X, start=0 * X), ValueError, "start: its norm is 0.0"),
    "metric": (lambda: curvature(torch.sum, X, metric=-X), ValueError, "metric: its smallest element is -1.0"),
    "tolerance": (lambda: curvature(torch.sum, X, tolerance=0), ValueError, "tolerance: 0; it must be in"),
    "no tolerance": (lambda: curvature(torch.sum, X, tolerance=None), ValueError, "tolerance: None"),
    "products": (lambda: curvature(torch.sum, X, max_products=0), ValueError, "max_products: 0"),
    "half a product": (lambda: curvature(torch.sum, X, max_products=2.5), ValueError, "max_products: 2.5; it must be"),
    "complex direction": (lambda: curvature_along(torch.sum, X, 1j * X), TypeError, "direction: torch.complex64"),
    "direction": (lambda: curvature_along(torch.sum, X, 0 * X), ValueError, "direction: its norm is 0.0"),
    "half": (
        lambda: curvature(lambda x: WITHOUT["OnceSquare"].apply(x).sum(), X.half()),
        ValueError,
        "float16 is too coarse",
    ),
    "in f": (lambda: curvature(lambda x: (x @ torch.ones(4)).sum(), X), RuntimeError, "inconsistent tensor size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, error, message = REFUSED[name]
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        call()
