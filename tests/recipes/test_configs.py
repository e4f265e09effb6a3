"""Every config is run: the recipe of its name takes a few steps with it, and writes curves into TensorBoard."""

import math

import pytest

from recipes.__main__ import main
from tests.recipes.conftest import NAMES, ROOT, brief, curves, runs

# Curves that each recipe shows; a recipe that compares methods or nets writes a run for each.
CURVES = {
    "depth": {"loss/train", "loss/val", "lr", "first_gradient_log10/200 layers"},
    "descent": {"gap_log10/rosenbrock"},
    "digits": {"loss/train", "loss/val", "accuracy/val", "lr"},
    "language_model": {"loss/train", "loss/val", "bits_per_byte/val", "bits_per_byte/test"},
    "learning_rate": {"loss/train", "loss/val"},
    "regression": {"loss/train", "loss/least_squares", "loss/val", "convergence/gap_log10", "lr", "sharpness/lambda"},
}


@pytest.mark.parametrize(
    # test_language_model.py runs that one as well.
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("descent", "language_model") else ()) for name in NAMES],
)
def test_config_trains(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main([*brief(name), "--trainer.enable_progress_bar=false"])
    run = tmp_path / "runs" / name / "version_0"
    assert (run / "config.yaml").is_file()
    found = {}
    for folder in runs(run):
        found |= curves(folder)
    assert set(found) >= CURVES[name]
    assert all(math.isfinite(value) for tag in CURVES[name] for _, value in found[tag])
    # A dashboard, not a pile: every curve stands in a group, beside what it is compared with.
    assert {tag for tag in found if "/" not in tag} <= {"epoch", "lr"}


def test_every_recipe_has_a_config():
    modules = (ROOT / "recipes").glob("[!_]*.py")
    assert {file.stem for file in modules if "\ndef main(" in file.read_text()} == set(NAMES) == set(CURVES)
