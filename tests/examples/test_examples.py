"""Each script beside this file runs as a user runs it: a command in a fresh process, twice where it resumes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
START = 1.1  # of three classes: log 3

# What Hugging Face's packages bring stays apart from the other tests: `make .venv-examples/.installed`.
APART = ROOT / ".venv-examples/bin/python"

# script, the Python, how it runs it, whether a second run goes on
EXAMPLES = [
    ("plain", sys.executable, [], True),
    ("lightning", sys.executable, [], True),
    ("fabric", sys.executable, [], False),
    ("fsdp", sys.executable, TORCHRUN, False),
    ("accelerate", APART, [], False),
    ("hugging_face", APART, [], True),
]


def run(folder: Path, name: str, python: str | Path, how: list[str]) -> float:
    done = subprocess.run(
        [str(python), "-P", *how, str(HERE / f"{name}.py"), str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return float(re.search(r"^loss (\S+)$", done.stdout, re.MULTILINE)[1])


@pytest.mark.parametrize(
    ("name", "python", "how", "resumes"),
    [pytest.param(*each, marks=() if each[0] == "plain" else pytest.mark.slow, id=each[0]) for each in EXAMPLES],
)
def test_example(name, python, how, resumes, tmp_path):
    loss = run(tmp_path, name, python, how)
    assert loss < START / 2
    if resumes:
        assert run(tmp_path, name, python, how) == pytest.approx(loss, abs=1e-4)


def test_every_script_is_run():
    assert {file.stem for file in HERE.glob("*.py")} - {"test_examples", "conftest"} == {name for name, *_ in EXAMPLES}
