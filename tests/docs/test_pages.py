"""The documentation's written pages are true: their code runs and prints what they show, their commands exist."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from generator import snippets
from lightning import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from torchcalc.__main__ import main as run_torchcalc
from torchcalc.testing.__main__ import main as run_checks

ROOT = Path(__file__).resolve().parents[2]
PAGES = {str(path.relative_to(snippets.PAGES)): path.read_text() for path in sorted(snippets.PAGES.rglob("*.md"))}
#: Whose Python has tests of its own.
FILES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "torchcalc/README.md")
README = {name: (ROOT / name).read_text() for name in FILES}
NUMBER = r"\d+(?:\.\d+)?"


def all_blocks(language: str) -> list[tuple[str, str]]:
    """(page, block) of a language, of the README too."""
    return [(name, block) for name, text in (PAGES | README).items() for block in snippets.blocks(text, language)]


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")  # by Lightning
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # for data in memory
@pytest.mark.filterwarnings("ignore:The number of training batches")  # only the example's are so few
@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if snippets.blocks(text, "python")])
def test_code_prints_what_is_shown(name, monkeypatch, tmp_path):
    """Numbers to 20 %: they come out of float32 and another machine's rounding."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for printed, shown in snippets.run(PAGES[name], name):
        assert re.sub(NUMBER, "", printed) == re.sub(NUMBER, "", shown or "")
        for ours, theirs in zip(re.findall(NUMBER, printed), re.findall(NUMBER, shown or ""), strict=True):
            assert float(ours) == pytest.approx(float(theirs), rel=0.2), (printed, shown)


COMMANDS = [(name, line) for name, block in all_blocks("sh") for line in block.splitlines()]
RECIPES = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
PHRASES = [
    (name, " ".join(words.split()))
    for name, text in (PAGES | README).items()
    for words in re.findall(r"(?<!`)`((?:make|python -m|PYTHONPATH=)\s[^`]+)`(?!`)", text)
]


def check_make(words: list[str]) -> None:
    assert words[1] in TARGETS
    variables = dict(word.split("=", 1) for word in words[2:])
    assert variables.get("RECIPE", "digits") in RECIPES
    assert set(variables) <= {"RECIPE", "ARGS", "TORCH", "PYTHON"}


@pytest.mark.parametrize(("name", "line"), sorted(set(PHRASES)))
def test_command_named_in_the_text_exists(name, line):
    words = shlex.split(line)
    if words[0] == "make":
        check_make([word for word in words if word != "..."])
    else:
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None


@pytest.mark.parametrize(("name", "line"), COMMANDS, ids=[f"{name}: {line}" for name, line in COMMANDS])
def test_command_works(name, line, capsys):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        check_make(words)
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(words[2:]) <= {".", "--no-build-isolation", *(f".[{extra}]" for extra in extras)}
    elif words[:3] == ["python", "-m", "torchcalc.testing"]:
        assert run_checks(words[3:]) == 0
        assert "held: " in capsys.readouterr().out
    else:
        assert words[:3] == ["python", "-m", "torchcalc"], line
        with pytest.raises(SystemExit) if "build" in words else _nothing():
            run_torchcalc([*words[3:], *(["--help"] if "build" in words else [])])
        assert capsys.readouterr().out


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


SETTINGS = all_blocks("yaml")


@pytest.mark.parametrize(("name", "block"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_settings_are_accepted(name, block):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_subclass_arguments(torch.optim.Optimizer, "optimizer", skip={"params"}, required=False)
    settings = yaml.safe_load(block)
    parsed = parser.parse_object(settings)
    assert parsed.trainer.callbacks or parsed.optimizer.class_path == settings["optimizer"]["class_path"]
