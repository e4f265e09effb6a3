"""What a recipe can be told: its help begins with its own settings, as one types them."""

import re
import shlex

import pytest

from recipes.__main__ import main
from tests.recipes.conftest import NAMES


def printed(argv, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_help_begins_with_the_recipes_own_settings(name, capsys):
    said = printed([name, "--help"], capsys)
    assert said.startswith(f"usage: python -m recipes {name} [fit | validate | test] [--setting=value ...]\n")
    own, options = said.split("\noptions:\n")
    settings = [shlex.split(line)[0] for line in own.splitlines() if line.startswith("  --")]
    assert len(settings) > 3
    # As they are shown they can be typed, and change nothing.
    config = printed([name, "fit", "--print_config"], capsys)
    assert printed([name, "fit", *settings, "--print_config"], capsys) == config
    groups = re.findall(r"^(\w+):$", options, flags=re.MULTILINE)
    assert groups[-1] == "trainer"
    assert "model" in groups and "checkpoint" in groups
    assert "known subclasses" not in options
    assert len(options.splitlines()) < 450


def test_settings_of_the_digits(capsys):
    own, options = printed(["digits", "fit", "-h"], capsys).split("\noptions:\n")
    for line in ("--optimizer.lr=0.003", "--data.batch_size=64", "--model.net.width=32", "--trainer.max_epochs=20"):
        assert f"  {line}\n" in own
    assert "images a training step sees" in options
    assert "best and last mean those of the newest run" in " ".join(options.split())


def test_help_without_a_recipe_lists_them(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert re.findall(r"^  (\w+) +\S", said, flags=re.MULTILINE) == NAMES
    assert "digits          Handwritten digits by cross-entropy" in said
