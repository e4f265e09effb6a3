"""A run that is interrupted says how it goes on, and one that diverged does not end like a good one."""

import shlex
import signal
import sys
from collections.abc import Iterator

import pytest

from recipes.__main__ import main
from recipes.cli import RecipeCLI
from recipes.digits import Classifier
from tests.recipes.conftest import BRIEF, curves, report_rows

QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture
def sigint() -> Iterator[None]:
    """Lightning ignores it from the first Ctrl-C on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("epoch", [0, 2])
def test_interrupted(epoch, tmp_path, monkeypatch, capsys):
    step = Classifier.training_step

    def interrupted(self, batch):
        if self.current_epoch == epoch:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Classifier, "training_step", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["digits", *BRIEF, "--trainer.max_epochs=4", QUIET])
    monkeypatch.setattr(Classifier, "training_step", step)
    assert end.value.code == 130
    out = capsys.readouterr().out
    report = report_rows(out)
    assert report["interrupted"] == f"in epoch {epoch}"
    assert report["run"] == "runs/digits/version_0"
    python, *command = shlex.split(report["resume"])
    assert python == sys.executable and command[:2] == ["-m", "recipes"]
    main([*command[2:], QUIET])
    assert [step for step, _ in curves(tmp_path / "runs/digits/version_0")["loss/val"]] == [3, 7, 11, 15]


def test_interrupted_before_training(tmp_path, monkeypatch, capsys):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RecipeCLI, "instantiate_classes", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["digits", *BRIEF])
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


# Settings with which the loss is nan or inf after a step or two. What diverges is the subject of the other recipes.
DIVERGING = {
    "depth": ["--optimizer.lr=1e30", "--model.depths=[2]"],
    "digits": ["--optimizer.lr=1e30"],
    "regression": ["--model.step=null", "--optimizer.lr=1e200"],
}


@pytest.mark.parametrize("name", DIVERGING)
def test_diverged(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([name, *BRIEF, *DIVERGING[name], "--trainer.max_epochs=3", QUIET])
    assert end.value.code == 1
    out, err = capsys.readouterr()
    error = err.splitlines()[-1]
    assert error.startswith("error: after ") and ("is nan" in error or "is inf" in error)
    assert error.endswith("the training diverged; try a smaller learning rate")
    assert "best checkpoint" not in report_rows(out)
    assert report_rows(out)["run"] == f"runs/{name}/version_0"
    if "loss/val is nan" in error:  # no step leads back: the other epochs are spared
        assert error.startswith("error: after 4 steps")
