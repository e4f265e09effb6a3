import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import recipes.cli  # noqa: F401  # here, and not in a test: Lightning's log keeps the stderr that it finds at its import

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NAMES = [config.stem for config in CONFIGS]

# A run of a few steps, of any recipe; what a recipe needs beside it.
BRIEF = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=4", "--trainer.log_every_n_steps=1"]
BRIEF_TOO = {
    "descent": ["--model.frames=2"],
    "language_model": [
        *("--model.width=16", "--model.layers=1", "--model.heads=2", "--model.against_stock=2", "--model.sample=4"),
        *(
            "--data.batch_size=4",
            "--data.context=16",
            "--trainer.val_check_interval=2",
            "--trainer.limit_val_batches=2",
        ),
        "--trainer.limit_test_batches=2",
    ],
}


def brief(name: str) -> list[str]:
    """Return the command line of a short run of a recipe."""
    return [name, *BRIEF, *BRIEF_TOO.get(name, [])]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine two threads spend most of the time waiting for one another: nets this small gain nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def report_rows(out: str) -> dict[str, str]:
    """Return the table of two columns that a run's output ends with."""
    *_, table = f"\n{out.rstrip()}".rpartition("\n\n")
    return dict(re.split(" {2,}", line, maxsplit=1) for line in table.splitlines())


def run_recipe(folder: Path, *args: str) -> SimpleNamespace:
    """Run ``python -m recipes`` in ``folder`` as a user does; return what it printed, its lines and its report."""
    done = subprocess.run(
        [sys.executable, "-m", "recipes", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(
        folder=folder,
        stdout=done.stdout,
        stderr=done.stderr,
        report=report_rows(done.stdout),
    )


def events(run: Path) -> EventAccumulator:
    """Read the event files that lie in a folder."""
    found = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars in a run's event files: (step, value) by tag."""
    found = events(run)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def runs(folder: Path) -> list[Path]:
    """Return the folders that hold event files, in or below ``folder``: what TensorBoard calls runs."""
    return sorted({file.parent for file in folder.rglob("events.out.tfevents*")})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three epochs of the digits recipe with the defaults of its config."""
    return run_recipe(tmp_path_factory.mktemp("trained"), "digits", "--trainer.max_epochs=3")
