"""The regression recipe arrives where NumPy and SciPy say that the optimum is, at the learning rate that it predicts."""

from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
from PIL import Image
from sklearn.datasets import load_diabetes

from recipes.cli import RecipeCLI
from recipes.data import Diabetes
from recipes.regression import LinearRegression, main
from tests.recipes.conftest import curves

# Arrives in a third of the steps.
MOMENTUM = ("--optimizer=torchcalc.optim.SGD", "--optimizer.momentum=0.9", "--model.step=0.5", "--trainer.max_epochs=3")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Give a function that trains with settings, quietly, and returns the recipe's CLI and its curves."""

    def run(*settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder := tmp_path_factory.mktemp("regression"))
            quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
            cli = RecipeCLI("regression", LinearRegression, Diabetes, [*quiet, *settings])
        return cli, curves(folder / "runs/regression/version_0"), folder / "runs/regression/version_0"

    return run


@pytest.fixture(scope="module")
def trained(train):
    return train()


@pytest.fixture(scope="module")
def problem():
    """The training set with a column of ones, and its targets, made from scikit-learn's arrays with NumPy."""
    data = Diabetes()
    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    rows = [int(np.abs(x - row.numpy()).sum(1).argmin()) for row in data.train.tensors[0]]
    return np.c_[x[rows], np.ones(len(rows))], y[rows]


def huber(r):
    return np.where(np.abs(r) < 1, r**2 / 2, np.abs(r) - 0.5)


def test_the_closed_form_is_reached(trained, problem):
    cli, _, _ = trained
    a, y = problem
    exact, (residual,), *_ = np.linalg.lstsq(a, y)
    assert 0 <= cli.model.gap < 1e-4
    assert cli.model.least == pytest.approx(residual / len(y), rel=1e-12)
    np.testing.assert_allclose(cli.model.solution[:, 0].numpy(), exact, rtol=1e-9, atol=1e-12)
    loss = ((a @ cli.model.learned.numpy() - y) ** 2).mean()
    assert loss / (residual / len(y)) - 1 == pytest.approx(cli.model.gap, abs=1e-12)


def test_curves_show_how(trained, problem):
    cli, by_tag, _ = trained
    assert {value for _, value in by_tag["loss/least_squares"]} == {np.float32(cli.model.least)}
    gap = [value for _, value in by_tag["convergence/gap_log10"]]
    assert all(b < a for a, b in pairwise(gap))  # below the limit the loss falls at every step
    assert gap[0] > -1 and gap[-1] == pytest.approx(np.log10(cli.model.gap), abs=1e-3)
    assert by_tag["convergence/gradient_log10"][-1][1] < -2
    assert {"loss/train", "loss/val", "loss/test", "lr"} <= set(by_tag)


def test_learning_rate_is_a_part_of_the_limit(trained, problem):
    _, by_tag, _ = trained
    a, _ = problem
    sharpness = np.linalg.eigvalsh(2 * a.T @ a / len(a))[-1]
    assert {value for _, value in by_tag["lr"]} == {np.float32(0.9 * 2 / sharpness)}
    measured = [value for _, value in by_tag["sharpness/lambda"]]
    assert measured == pytest.approx(
        [sharpness] * 10, rel=1e-3
    )  # once an epoch, and the Hessian is the same everywhere
    assert by_tag["sharpness/lr_limit"][0][1] == pytest.approx(2 / sharpness, rel=1e-3)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_other_precisions(train, precision):
    cli, _, _ = train(f"--trainer.precision={precision}", "--trainer.max_epochs=1")
    assert 0 < cli.model.gap < 0.1


def test_huber_reaches_its_own_optimum(train, problem):
    cli, by_tag, _ = train("--model.loss=torchcalc.nn.HuberLoss", *MOMENTUM)
    a, y = problem
    best = scipy.optimize.minimize(
        lambda w: huber(a @ w - y).mean(), np.zeros(11), method="BFGS", options={"gtol": 1e-9}
    )
    loss = huber(a @ cli.model.learned.numpy() - y).mean()
    assert loss / best.fun - 1 < 1e-4
    assert cli.model.gap < 0  # better than least squares, at its own loss
    assert by_tag["lr"][0][1] == pytest.approx(0.5 * 2 * 1.9 / np.linalg.eigvalsh(a.T @ a / len(a))[-1])


def test_beyond_the_limit_is_refused_and_diverges(train, capsys):
    with pytest.raises(SystemExit):
        train("--model.step=1.1")
    assert "model.step" in capsys.readouterr().err
    _, by_tag, _ = train("--trainer.max_epochs=1", "--model.step=null", "--optimizer.lr=0.3")
    assert by_tag["loss/train"][-1][1] > by_tag["loss/train"][0][1]


@pytest.mark.parametrize("setting", ["--model.loss=torchcalc.nn.L1Loss", "--optimizer=torchcalc.optim.Adam"])
def test_step_without_a_known_limit(setting, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([setting, "--trainer.enable_progress_bar=false"])
    assert "error: model.step needs SGD or GradientDescent and a loss curved at 0" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


def test_report_and_picture(trained, capsys):
    cli, _, folder = trained
    assert f"{cli.model.gap:.1e}" in cli.model.report()
    with Image.open(folder / "regression.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_splits_are_disjoint_and_cover_everybody():
    data = Diabetes()
    patients = [{tuple(row.tolist()) for row in split.tensors[0]} for split in (data.train, data.val, data.test)]
    assert [len(split) for split in patients] == [309, 66, 67]
    assert len(set.union(*patients)) == 442
    x = np.concatenate([split.tensors[0].numpy() for split in (data.train, data.val, data.test)])
    np.testing.assert_allclose([x.mean(0), x.std(0)], [[0] * 10, [1] * 10], atol=1e-12)
