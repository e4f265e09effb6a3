"""``kill -9`` at any moment, then the same command with ``--ckpt_path=last``: the end is that of an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.recipes.conftest import ROOT, curves, report_rows
from tests.same import same

POINTS = ["in_the_middle_of_an_epoch", "in_validation", "while_a_checkpoint_is_written"]
RUN = "runs/digits/version_0"


def run(folder: Path, command: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    """Run the recipe as its config has it, but for a checkpoint every five steps."""
    config = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    (keeper,) = (each for each in config["trainer"]["callbacks"] if each["class_path"].endswith("ExactResume"))
    keeper["init_args"] = {"every_n_steps": 5}
    (folder / "often.yaml").write_text(yaml.safe_dump(config))
    settings = ["digits", "--config=often.yaml", "--trainer.max_epochs=3", "--trainer.enable_progress_bar=false"]
    return subprocess.run(
        [sys.executable, "-m", *command, *settings, *more],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, ["recipes"])
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def end(folder: Path) -> dict:
    """What training leaves: weights, optimizer, schedule and generators."""
    checkpoint = torch.load(folder / RUN / "checkpoints/last.ckpt", weights_only=True)
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "exact_resume")}


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed(point, whole, tmp_path):
    killed = run(tmp_path, ["tests.recipes.killed", point])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half_written = tmp_path / RUN / "checkpoints/.last.ckpt.tmp"
    assert half_written.exists() == (point == "while_a_checkpoint_is_written")
    resumed = run(tmp_path, ["recipes"], "--ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr
    assert [folder.name for folder in (tmp_path / "runs/digits").iterdir()] == ["version_0"]
    same(end(tmp_path), end(whole))
    before, after = (curves(each / RUN) for each in (whole, tmp_path))
    for tag in ("loss/train", "loss/val", "accuracy/val", "accuracy/test", "lr"):
        assert after[tag] == before[tag]
    for row in ("test loss", "test accuracy", "best checkpoint"):
        assert report_rows(resumed.stdout)[row] == report_rows((whole / "stdout").read_text())[row]


@pytest.mark.slow
@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal(which, code, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes", "digits", "--trainer.max_epochs=1000"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = tmp_path / RUN / "checkpoints/last.ckpt"
    for _ in range(600):
        if path.exists():
            break
        time.sleep(0.1)
    process.send_signal(which)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    report = report_rows(out)
    assert f"{which.name}: the training saves after this step, and ends" in err
    assert report["resume"].endswith(f"-m recipes digits --ckpt_path={RUN}/checkpoints/last.ckpt")
