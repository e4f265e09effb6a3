"""Every config is run: the recipe of its name trains a few steps with it, into TensorBoard."""

import pytest

from recipes.__main__ import main
from tests.recipes.conftest import ROOT, curves

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=[config.stem for config in CONFIGS])
def test_config_trains(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main([config.stem, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"])
    assert {"loss/train", "loss/val", "lr"} <= set(curves(tmp_path / "runs" / config.stem / "version_0"))


def test_every_recipe_has_a_config():
    recipes = {file.stem for file in (ROOT / "recipes").glob("*.py")} - {"__init__", "__main__", "cli", "errors"}
    assert {config.stem for config in CONFIGS} == recipes
    assert recipes
