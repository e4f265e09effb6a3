"""A default device is the user's business: what is computed stays where its inputs are.

Under the default device "meta" a tensor that is made without a device has no numbers, and whatever it meets fails at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torchcalc.functional as ours
import torchcalc.optim
from tests import checks
from tests.functions import ROWS, Row
from tests.optim.cases import CASES, Case, build
from torchcalc import calculus, convergence, instruments
from torchcalc.instruments.figures import pixels
from torchcalc.testing import assert_function, assert_loss, assert_optimizer
from torchcalc.testing.__main__ import example


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_functions(row: Row) -> None:
    def derivatives() -> list[Any]:
        leaves = checks.fresh(inputs, row.grads)
        over = [leaves[i] for i in row.grads]
        y = row.ours(*leaves)
        first = torch.autograd.grad(y, over, checks.like_output(y), create_graph=True)
        curved = [g for g in first if g.requires_grad]
        second = torch.autograd.grad([g.square().sum() for g in curved], over, allow_unused=True) if curved else ()
        return [y.detach(), *(g.detach() for g in first), *(g for g in second if g is not None)]

    inputs = row.inputs()
    expected = derivatives()
    with torch.device("meta"):
        found = derivatives()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


ROWS_OF_OPTIMIZERS = [
    pytest.param(case, config, extras, id=f"{case.name}-{i}-{'-'.join(extras)}")
    for case in CASES
    for i, config in enumerate(case.configs)
    for extras in ({}, dict(max_norm=1.0), dict(rounding="stochastic"), dict(foreach=True), dict(foreach=False))
    if all(map(case.takes, extras)) and not (extras and i)
]


@pytest.mark.parametrize(("case", "config", "extras"), ROWS_OF_OPTIMIZERS)
def test_optimizers(case: Case, config: dict[str, Any], extras: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "rounding" in extras else torch.float32

    def steps(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (5,))]
        grads = [[torch.randn_like(p) for p in ps] for _ in range(3)]
        with torch.device(device):
            optimizer = build(case.cls, ps, config, **extras)
            for given in grads:
                for p, g in zip(ps, given, strict=True):
                    p.grad = g.clone()
                optimizer.step()
        return [p.detach() for p in ps]

    assert all(map(torch.equal, steps("meta"), steps("cpu")))


def test_check_function() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.device("meta"):
        assert_function(ours.gelu, x, reference=torch.nn.functional.gelu, progress=False)


def test_check_loss() -> None:
    x, target = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    with torch.device("meta"):
        assert_loss(ours.cross_entropy, x, target, reference=torch.nn.functional.cross_entropy, progress=False)


def test_check_optimizer() -> None:
    with torch.device("meta"):
        assert_optimizer(torchcalc.optim.SGD, torch.optim.SGD, options=dict(lr=0.1, momentum=0.9), progress=False)


def bent(p: torch.Tensor) -> torch.Tensor:
    return (p**4).sum(-1) + p[..., 0] * p[..., 1]


AT, ALONG = torch.tensor([3.0, 1.0], dtype=torch.float64), torch.tensor([-1.0, 0.5], dtype=torch.float64)
X, Y = torch.linspace(-1, 1, 12).reshape(6, 2), torch.linspace(0, 1, 6)[:, None]
PATH = [{"w": AT - i * ALONG} for i in range(4)]


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 1, device="cpu")
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.constant_(model.bias, 0.0)
    optimizer = torchcalc.optim.Adam(model.parameters(), lr=0.1)
    torch.nn.functional.mse_loss(model(X), Y).backward()
    optimizer.step()
    return model, optimizer


def reading() -> instruments.SharpnessReading:
    model, optimizer = trained()
    loss = calculus.training_loss(model, torch.nn.functional.mse_loss, (X, Y))
    return instruments.sharpness(loss, optimizer, dict(model.named_parameters()))


def range_test() -> convergence.RangeTest:
    model, optimizer = trained()
    return convergence.range_test(model, torch.nn.functional.mse_loss, (X, Y), optimizer)


def history() -> instruments.DepthHistory:
    history = instruments.DepthHistory()
    for step in range(3):
        history.add(step, {"first": 1e-3 * (step + 1), "last": 0.5})
    return history


def animation(folder: Path) -> bytes:
    walk = {"walk": torch.stack([p["w"] for p in PATH])}
    file = instruments.animate_paths(bent, (-4, 8, -4, 4), walk, folder / "walk.gif", resolution=9, frames=2)
    return file.read_bytes()


ENTRY_POINTS: dict[str, Callable[[], Any]] = {
    "derivative": lambda: calculus.derivative(torch.sin)(AT),
    "partial": lambda: calculus.partial(lambda x, y: (x * y**2).sum(), 1)(AT, ALONG),
    "gradient": lambda: calculus.gradient(bent)(AT),
    "jacobian": lambda: calculus.jacobian(torch.sin)(AT),
    "directional derivative": lambda: calculus.directional_derivative(bent, ALONG)(AT),
    "hessian": lambda: calculus.hessian(bent)(AT),
    "hvp": lambda: calculus.hvp(bent, ALONG)(AT),
    "numeric derivative": lambda: calculus.numeric_derivative(torch.exp, AT),
    "curvature": lambda: calculus.curvature(bent, AT),
    "curvature along": lambda: calculus.curvature_along(bent, AT, ALONG),
    "backward graph": lambda: str(calculus.backward_graph(trained()[0](X).sum())),
    "line search": lambda: [convergence.line_search(bent, AT, -AT, method=m) for m in ("armijo", "strong_wolfe")],
    "range test": range_test,
    "stability limit": lambda: convergence.stability_limit(trained()[1], 10.0),
    "preconditioner": lambda: list(convergence.preconditioner(trained()[1]).values()),
    "verdict": lambda: [convergence.verdict([1 / (i + 1) for i in range(n)]) for n in (6, 400)],
    "sharpness": reading,
    "loss slice": lambda: instruments.loss_slice(lambda p: bent(p["w"]), PATH[0], PATH[-1]),
    "loss plane": lambda: instruments.loss_plane(lambda p: bent(p["w"]), PATH, resolution=5),
    "depth history": lambda: history().state_dict(),
    "example": lambda: [example(text, 0) for text in ("3,4", "3,4:uniform", "5:classes=3")],
}
FIGURES: dict[str, Callable[[], Any]] = {
    "range test": lambda: range_test().figure(),
    "loss slice": lambda: instruments.loss_slice(lambda p: bent(p["w"]), PATH[0], PATH[-1]).figure(),
    "loss plane": lambda: instruments.loss_plane(lambda p: bent(p["w"]), PATH, resolution=5).figure(),
    "depth history": lambda: history().figure("norm"),
    "contours": lambda: instruments.contour_figure(bent, (-4, 8, -4, 4), resolution=9),
    "confusion": lambda: instruments.confusion_figure(torch.eye(3, dtype=torch.int64, device="cpu")),
    "scatter": lambda: instruments.scatter_figure(X[:, :1], Y),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points(name: str) -> None:
    expected = ENTRY_POINTS[name]()
    with torch.device("meta"):
        found = ENTRY_POINTS[name]()
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name: str) -> None:
    expected = pixels(FIGURES[name]())
    with torch.device("meta"):
        found = pixels(FIGURES[name]())
    assert (found == expected).all()


def test_animation(tmp_path: Path) -> None:
    expected = animation(tmp_path)
    with torch.device("meta"):
        assert animation(tmp_path) == expected


def test_a_checkpoint_with_numbers() -> None:
    """The steps of old checkpoints are numbers."""
    optimizer = trained()[1]
    old = optimizer.state_dict()
    for state in old["state"].values():
        state["step"] = 3
    with torch.device("meta"):
        optimizer.load_state_dict(old)
    assert [float(state["step"]) for state in optimizer.state.values()] == [3.0, 3.0]


def test_a_compiled_step() -> None:
    def weights() -> torch.Tensor:
        w = torch.nn.Parameter(X.clone())
        w.grad = Y * X
        torch.compile(torchcalc.optim.SGD([w], lr=0.1).step, backend="aot_eager")()
        return w.detach()

    expected = weights()
    with torch.device("meta"):
        found = weights()
    assert torch.equal(found, expected)
