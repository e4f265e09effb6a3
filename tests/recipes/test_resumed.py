"""Every recipe goes on where it was stopped: weights, optimizers, curves and what it keeps itself are those of one run."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml

from recipes.__main__ import main
from tests.recipes.conftest import NAMES, ROOT, brief, curves, report_rows, runs
from tests.same import same
from torchcalc.instruments import ExactResume

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
BATCHES = 7
SETTINGS = {  # over those of a brief run
    "depth": ["--model.depths=[2,6]"],
    "descent": [
        *("--model.frames=2", "--model.steps=30", f"--trainer.limit_train_batches={2 * BATCHES}"),
        *("--model.lr={beale: {momentum: 0.002, Adam: 0.5, backtracking: 1}}", "--model.sweep=[0.5]"),
    ],
    "language_model": ["--model.against_stock=0"],
    "learning_rate": ["--model.per_decade=1", "--model.sharpness_every=3", "--data.steps=30"],
}


class Killed(BaseException):
    """Nothing is saved on it."""


def often(name: str) -> str:
    """The recipe's config, with a checkpoint every second step."""
    config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    (keeper,) = (each for each in config["trainer"]["callbacks"] if each["class_path"].endswith("ExactResume"))
    keeper["init_args"] = {"every_n_steps": 2, "every_seconds": None}
    Path("often.yaml").write_text(yaml.safe_dump(config))
    return "--config=often.yaml"


def train(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    epochs = [f"--trainer.limit_train_batches={BATCHES}", "--trainer.max_epochs=2"]
    if name == "descent":  # its epoch is its training
        epochs = []
    # In full: the event files of what is killed are written by a thread, which is not.
    place = f"--trainer.logger.save_dir={folder}/runs"
    main([name, often(name), *brief(name)[1:], *epochs, *SETTINGS.get(name, []), *QUIET, place, *more])


def end(folder: Path, name: str) -> dict:
    """What training leaves: all that the last checkpoint has, but for what clocks tell; and the curves."""
    run = folder / "runs" / name / "version_0"
    found = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    kept = {key: value for key, value in found.items() if key not in ("callbacks", "loops")}
    drawn = {str(each.relative_to(run)): curves(each) for each in runs(run)}
    for tags in drawn.values():  # measured when the clock allows it, of the first batch since the start
        for tag in [tag for tag in tags if tag.startswith("sharpness/")]:
            del tags[tag]
    return {**kept, "curves": drawn}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "language_model" else pytest.mark.slow) for name in NAMES]
)
def test_resumed(name, tmp_path, monkeypatch, capsys):
    train(name, tmp_path / "whole", monkeypatch)
    times = itertools.count(1)
    hook = ExactResume.on_train_batch_end

    def killed(self, *args):
        hook(self, *args)
        if next(times) == BATCHES + 3:  # in the second epoch, a step after a checkpoint
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(ExactResume, "on_train_batch_end", killed)
        with pytest.raises(Killed):
            train(name, tmp_path / "killed", monkeypatch)
    train(name, tmp_path / "killed", monkeypatch, "--ckpt_path=last")
    same(end(tmp_path / "killed", name), end(tmp_path / "whole", name))
    # Once more: nothing is left to do, and the report and the pictures are made again.
    capsys.readouterr()
    for picture in (pictures := list((tmp_path / "killed").rglob("*.png"))):
        picture.unlink()
    train(name, tmp_path / "killed", monkeypatch, "--ckpt_path=last")
    out, err = capsys.readouterr()
    assert "warning: no step was made: the checkpoint has all" in err
    assert report_rows(out)["run"] == f"runs/{name}/version_0"
    assert all(picture.exists() for picture in pictures)
