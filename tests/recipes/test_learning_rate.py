"""The learning_rate recipe: every copy learns as if alone, the prediction is the Hessian's, disagreement is explained."""

import math

import pytest
import torch
from torch.func import functional_call

from recipes.__main__ import main
from recipes.data import WholeDigits
from recipes.learning_rate import Perceptron
from recipes.learning_rate_figure import Run, sweep_table
from tests.recipes.conftest import curves, run_recipe

SMALL = ["--data.steps=12", "--model.low=0.05", "--model.high=5", "--model.per_decade=1", "--model.sharpness_every=6"]
QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture(scope="module", params=["torchcalc.optim.SGD", "torchcalc.optim.GradientDescent"])
def swept(request, tmp_path_factory):
    """The folder of a short sweep of three learning rates; GradientDescent asks for each loss twice."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["learning_rate", *SMALL, QUIET, f"--optimizer={request.param}"])
    return folder / "runs/learning_rate/version_0"


def test_every_copy_learns_as_if_alone(swept):
    x, y = WholeDigits().train.tensors
    for lr in (0.05, 0.5, 5.0):
        torch.manual_seed(0)
        net = Perceptron()
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        shown = curves(swept / f"lr={lr:g}")["sweep/loss_log10"]
        assert [step for step, _ in shown] == list(range(12))
        assert [10**value for _, value in shown] == pytest.approx(losses, rel=1e-3)


def test_sharpness_is_the_largest_eigenvalue_of_the_hessian(swept):
    torch.manual_seed(0)
    net = Perceptron()
    x, y = WholeDigits().train.tensors
    sizes = {name: p.shape for name, p in net.named_parameters()}

    def loss(w):
        parts = w.split([size.numel() for size in sizes.values()])
        params = {name: part.view(sizes[name]) for name, part in zip(sizes, parts, strict=True)}
        return torch.nn.functional.cross_entropy(functional_call(net, params, x.double()), y)

    w = torch.cat([p.detach().flatten() for p in net.parameters()]).double()
    v = torch.randn(len(w), dtype=torch.float64)
    for _ in range(60):  # power iteration; the negative eigenvalues are smaller
        v = torch.autograd.functional.hvp(loss, w, v / v.norm())[1]
    for lr in ("0.05", "0.5", "5"):
        assert curves(swept / f"lr={lr}")["sweep/sharpness"][0][1] == pytest.approx(v.norm().item(), rel=0.02)


def test_figures_and_best_loss(swept):
    assert (swept / "learning_rate.png").stat().st_size > 20_000
    assert (swept / "range_test.png").stat().st_size > 10_000
    best = [
        10 ** min(values)
        for values in zip(*([v for _, v in curves(r)["sweep/loss_log10"]] for r in swept.glob("lr=*")), strict=True)
    ]
    assert [value for _, value in curves(swept)["loss/train"]] == pytest.approx(best)


FALLS = [0.9**step for step in range(100)]
WAVES = [1 + 0.5 * (-1) ** step for step in range(100)]
CLIMBS = [1.1**step for step in range(100)]
SLOW = [1 - 0.001 * step for step in range(100)]

# lr as a part of the limit, slope, λ on the way, losses, predicted, seen, the reason if they differ
RUNS = [
    (0.3, 1.0, [2.0, 3.0], FALLS, "converges", "converges", ""),
    (0.3, 0.001, [2.0, 2.0], SLOW, "crawls", "crawls", ""),
    (0.95, 1.0, [2.0, 2.0], WAVES, "oscillates", "oscillates", ""),
    (2.0, 1.0, [2.0, 2.0], CLIMBS, "diverges", "diverges", ""),
    (2.0, 1.0, [2.0, math.nan], [1.0, 2.0, math.nan, math.nan], "diverges", "diverges", ""),
    (0.3, 0.001, [2.0, 2.0], FALLS, "crawls", "converges", "the slope changed: at the start it promised a fall by 3%"),
    (2.0, 0.001, [2.0, 2.0], CLIMBS, "diverges", "diverges", ""),
    (0.3, 1.0, [2.0, 2.0], WAVES, "converges", "oscillates", "λ stays at 2, stable up to 6.7, but far from a minimum"),
    (0.3, 1.0, [2.0, 8.0, 3.0], WAVES, "converges", "oscillates", "λ grew from 2 to 8; stable up to 6.7"),
    (0.95, 1.0, [2.0, 9.0, math.nan], CLIMBS, "oscillates", "diverges", "λ grew from 2 to 9; stable up to 2.1"),
    (0.95, 1.0, [2.0, 2.0], FALLS, "oscillates", "converges", "the overshoots, by 90% of the error a step, die out"),
    (2.0, 1.0, [2.0, 5.0, 0.5], FALLS, "diverges", "converges", "λ fell from 2 to 0.5; stable up to 1"),
    (2.0, 1.0, [2.0, 3.0], WAVES, "diverges", "oscillates", "λ stays at 3, stable up to 1, but far from"),
]


@pytest.mark.parametrize(("part", "slope", "sharpness", "losses", "predicted", "seen", "says"), RUNS)
def test_disagreement_is_explained(part, slope, sharpness, losses, predicted, seen, says):
    run = Run(lr=part, limit=1.0, slope=slope, sharpness=sharpness, losses=losses)
    assert (run.predicted, run.seen) == (predicted, seen)
    assert run.reason.startswith(says) if says else not run.reason
    assert sweep_table([run]).endswith(run.reason or seen)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("--model.low=1000", "recipes.learning_rate.Sweep: low: 1000.0; it must be below high, which is 100.0"),
        ("--model.low=0", "model.low: Not of type PositiveFloat"),
        (
            "--optimizer=torchcalc.optim.Lion",
            "optimizer: Lion's limit moves with its state; use SGD",
        ),
        ("--data.steps=3", "data.steps: 3 in all; a curve of at least 4 has a verdict"),
        ("--optimizer=torchcalc.optim.GradientDescent --optimizer.backtrack=true", "optimizer.backtrack: true finds"),
    ],
)
def test_refused(setting, says, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["learning_rate", *setting.split(), QUIET])
    assert end.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_what_the_readme_says(tmp_path):
    """Five decades, from crawling to diverging; predictions hold but for a few, each with its reason."""
    printed = run_recipe(tmp_path, "learning_rate", QUIET).stdout
    rows = [line.split(maxsplit=4) for line in printed.splitlines() if line[:1].isdigit()]
    lrs = [float(lr) for lr, *_ in rows]
    assert len(rows) == 26 and lrs[-1] / lrs[0] == pytest.approx(1e5)
    seen = [row[3] for row in rows]
    assert seen == sorted(seen, key=["crawls", "converges", "oscillates", "diverges"].index)
    assert len(set(seen)) == 4
    wrong = [row for row in rows if row[2] != row[3]]
    assert len(wrong) <= 4
    assert all(len(row) == 5 for row in wrong) and all(len(row) == 4 for row in rows if row not in wrong)
    assert {row[3] for row in rows if float(row[1]) > 2} == {"diverges"}
    assert "diverges" not in {row[3] for row in rows if float(row[1]) < 0.7}
