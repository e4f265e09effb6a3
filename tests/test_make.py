"""The commands that the README promises."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def make(*arguments: str) -> str:
    """Run make as from a fresh shell: without what an outer ``make test-full`` hands down."""
    handed_down = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "ARGS", "PYTHON", "RECIPE", "TORCH")
    env = {key: value for key, value in os.environ.items() if key not in handed_down}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_alone_lists_the_commands():
    listed = set(re.findall(r"^  make ([a-z-]+) ", make(), flags=re.MULTILINE))
    assert listed >= {"train", "test", "test-full", "clean"}


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], "/python -m recipes digits "),
        (["ARGS=--trainer.max_epochs=3 --optimizer.lr=0.1"], "digits --trainer.max_epochs=3 --optimizer.lr=0.1"),
        (["ARGS=--help"], "/python -m recipes digits --help "),
        (["RECIPE=depth"], "/python -m recipes depth "),
        (["TORCH=9.9.9"], ".venv-9.9.9/bin/python -m recipes digits "),
    ],
    ids=["default", "settings", "help", "recipe", "torch"],
)
def test_make_train_runs_the_recipe(arguments, command):
    assert command in make("--dry-run", "train", *arguments).splitlines()[-1] + " "


def test_other_torch_has_its_own_environment_and_pin():
    planned = make("--dry-run", "test", "TORCH=9.9.9")
    assert "pip install --quiet -c .venv-9.9.9/constraints.txt 'torch==9.9.9'" in planned
    assert "s/^torch==.*/torch==9.9.9/" in planned
    assert ".venv/" not in planned


def test_a_warning_of_mkdocs_is_an_error():
    """With --quiet it would not be: --strict then sees none."""
    (command,) = (line for line in make("--dry-run", "docs").splitlines() if "mkdocs" in line)
    assert "--strict" in command and "--quiet" not in command


def test_kernels_are_built_again_where_a_source_or_a_formula_is_newer():
    rules = make("--print-data-base", "--dry-run", "help")
    needed = set(re.search(r"^\.venv/\.built: (.+)$", rules, flags=re.MULTILINE)[1].split())
    families = ("formula", "activations", "losses", "layers", "optim", "native")
    sources = {path for family in families for path in (ROOT / "torchcalc" / family).rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT)) for path in sources if path.suffix in (".py", ".cpp", ".h")}
    assert wanted <= needed
    for command in ("pytest", "train", "bench", "sanitize", "gallery", "docs"):
        assert re.search(rf"^{command}: \.venv/\.built$", rules, flags=re.MULTILINE)


@pytest.mark.slow
def test_make_train_ends_with_the_report(tmp_path):
    settings = f"--trainer.max_epochs=1 --trainer.logger.init_args.save_dir={tmp_path}"
    *_, report = make("train", f"ARGS={settings}").rstrip().rpartition("\n\n")
    names = [line.split("  ")[0] for line in report.splitlines()]
    assert names == ["test loss", "test accuracy", "best checkpoint", "run", "TensorBoard", "dashboard"]
    assert (tmp_path / "digits/version_0/checkpoints/best.ckpt").is_file()
