"""The depth recipe: nets of the depth they claim, predictions that measurements confirm, training that keeps nets apart."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from recipes.__main__ import main
from recipes.data import Digits
from recipes.deep_nets import VARIANCE, Residual, deep_net, gain, weight_gradients
from recipes.depth import Depth
from tests.recipes.conftest import curves, run_recipe
from torchcalc import nn as calc

KINDS = list(VARIANCE)


@pytest.fixture(scope="module")
def batch():
    return Digits().train[:64]


def mean(f):
    """E[f(z)], z ~ N(0, 1)."""
    return quad(lambda z: f(z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), -12, 12)[0]


def test_gain_of_sigmoid():
    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    q = brentq(lambda q: mean(lambda z: sigmoid(math.sqrt(q) * z) ** 2) - q, 1e-3, 10)
    slope = mean(lambda z: (sigmoid(math.sqrt(q) * z) * sigmoid(-math.sqrt(q) * z)) ** 2)
    assert gain("sigmoid") == pytest.approx(math.sqrt(slope), rel=1e-4)
    assert gain("sigmoid") < 1 / 4


def test_gain_of_relu_and_residual():
    assert gain("ReLU") == pytest.approx(1, rel=2e-3)
    assert gain("residual") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [2, 3, 17])
def test_depth_counts_linear_layers(kind, depth, batch):
    net = deep_net(kind, depth, width=8)
    assert sum(isinstance(layer, calc.Linear) for layer in net.modules()) == depth
    assert net(batch[0]).shape == (64, 10)
    assert len(weight_gradients(net, *batch)) == depth
    assert all(p.grad is None and p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_wide_net_has_the_predicted_slope(kind, batch):
    torch.manual_seed(0)
    depth = 12
    norms = weight_gradients(deep_net(kind, depth, width=512), *batch)
    slope = (norms[1] / norms[-2]) ** (1 / (depth - 3))
    assert slope == pytest.approx(gain(kind), rel=0.06)


def test_200_layers_at_initialisation(batch):
    torch.manual_seed(0)
    ratio = {
        kind: norms[0] / norms[-1] for kind in KINDS if (norms := weight_gradients(deep_net(kind, 200, 32), *batch))
    }
    assert 0 < ratio["sigmoid"] < 1e-110
    assert 1e-3 < ratio["ReLU"] < 1e3
    assert 0.5 < ratio["residual"] < 2


def test_residual_net_grows_as_derived(batch):
    """The variance by (2), the gradient by (3), which depend on neither width nor depth, up to the two layers at the ends."""
    torch.manual_seed(0)
    depth, stream = 50, []
    x = batch[0]
    for layer in deep_net("residual", depth, width=256):
        x = layer(x)
        if isinstance(layer, calc.Linear | Residual):
            x.retain_grad()
            stream.append(x)
    calc.CrossEntropyLoss()(x, batch[1]).backward()
    first, last = stream[0], stream[-2]  # the last of all are the logits
    a = (1 - 1 / math.pi) * (depth - 2) / depth
    assert (last.var(1).mean() / first.var(1).mean()).item() == pytest.approx(1 + a, rel=0.05)
    growth = (first.grad.norm() / last.grad.norm()).item()
    assert growth == pytest.approx(math.sqrt((1 + a) ** (1 / (1 - 1 / math.pi))), rel=0.05)


def test_nets_learn_as_if_alone(batch):
    torch.manual_seed(0)
    module = Depth([2, 4], width=8)
    module.log = lambda *args, **kwargs: None
    module.training_step(batch).backward()
    for net in module.nets.values():
        together = [p.grad for p in net.parameters()]
        alone = torch.autograd.grad(calc.CrossEntropyLoss()(net(batch[0]), batch[1]), list(net.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    main(["depth", "--model.depths=[2,5]", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"])
    run = tmp_path / "runs/depth/version_0"
    assert (run / "depth.png").stat().st_size > 10_000
    for kind in KINDS:
        by_tag = curves(run / kind)
        groups = ("accuracy", "first_gradient_log10")
        assert set(by_tag) == {f"{group}/{depth} layers" for group in groups for depth in (2, 5)}
        assert [step for step, _ in by_tag["accuracy/5 layers"]] == [17, 34]
    accuracies = curves(run / "residual")["accuracy/5 layers"]
    assert 0.1 < accuracies[0][1] < accuracies[1][1]
    printed = capsys.readouterr().out
    [row] = [line for line in printed.splitlines() if line.startswith("residual: test accuracy")]
    assert float(row.split()[-1]) == pytest.approx(curves(run)["residual_5/test"][0][1], abs=5e-4)
    rows = [line for line in printed.splitlines() if line.startswith("test ")]
    assert len(rows) == len(KINDS) and len({line.rindex(" ") for line in rows}) == 1  # one column
    [checkpoint] = run.glob("checkpoints/*.ckpt")
    norms = torch.load(checkpoint, weights_only=True)["gradients"]
    assert {name: len(each) for name, each in norms.items()} == {
        f"{kind}_{depth}": depth for kind in KINDS for depth in (2, 5)
    }
    main(["depth", "test", f"--ckpt_path={checkpoint}"])
    assert len(curves(run)["residual_5/test"]) == 2


def test_the_curve_of_a_vanishing_gradient_goes_on_where_float32_ends():
    torch.manual_seed(0)
    module = Depth([60], width=8)
    data = Digits()
    module.log = lambda *args, **options: None
    x, y = data.train[:256]
    module.training_step((x, y)).backward()
    module.on_before_optimizer_step(None)
    module._trainer = SimpleNamespace(datamodule=data)
    truth = weight_gradients(module.nets["sigmoid_60"], x, y)[0]
    assert module.first["sigmoid_60"] == 0 and 0 < truth < 1e-30
    assert module.norm_at_first_layer("sigmoid_60") == truth
    assert module.norm_at_first_layer("residual_60") == module.first["residual_60"]


def test_test_without_training(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    main(["depth", "test", "--model.depths=[2,5]"])
    assert "residual_5/test" in capsys.readouterr().out
    assert (tmp_path / "runs/depth/version_0/depth.png").is_file()


@pytest.mark.parametrize("depths", ["[1]", "[]", "[2.5]"])
def test_depths_out_of_range(depths, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["depth", f"--model.depths={depths}"])
    assert "depths" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_the_readme_says(tmp_path):
    """The 200-layer residual net learns, the sigmoid net's gradient vanishes and it does not."""
    printed = run_recipe(tmp_path, "depth", "--trainer.enable_progress_bar=false").stdout
    rows = {
        line[:31].strip(): [float(cell) for cell in line[31:].split()]
        for line in printed.splitlines()
        if ": " in line[:31]
    }
    assert rows["residual: test accuracy"][-1] > 0.93
    assert rows["residual: test accuracy"][-1] > rows["residual: test accuracy"][0]
    assert rows["sigmoid: test accuracy"][0] > 0.7 and rows["sigmoid: test accuracy"][-1] < 0.15
    assert rows["sigmoid: first / last gradient"][-1] < 1e-110
    assert 0.5 < rows["residual: first / last gradient"][-1] < 2
