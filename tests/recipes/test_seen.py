"""Every recipe is seen: TensorBoard serves a run of it, and headless Chromium finds its curves and pictures on the page."""

import math
import os
from pathlib import Path

import pytest
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from recipes.__main__ import main
from recipes.gallery.browser import Browser, find_chromium
from recipes.gallery.tensorboard import ask, charts, photograph, serve
from tests.recipes.conftest import NAMES, brief, curves, events, runs

CARDS = 9  # on a page of this size
SIZE = 1600, 1600


@pytest.fixture(scope="module")
def chromium():
    """Skip where there is no browser; in CI, which installs one, fail."""
    if find_chromium() is None:
        if os.environ.get("TORCHCALC_REQUIRE_CHROMIUM") == "1":
            pytest.fail("there is no Chromium, and TORCHCALC_REQUIRE_CHROMIUM=1 demands it")
        pytest.skip("there is no Chromium; on Debian: apt-get install chromium")


def number(shown):
    return float(shown.replace(",", "").replace("\N{MINUS SIGN}", "-"))


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    """The runs of a recipe, of which there is a short one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("seen"))
        main([*brief(request.param), "--trainer.enable_progress_bar=false"])
        return Path.cwd() / "runs" / request.param


@pytest.mark.slow
def test_curves_and_pictures_are_on_the_page(folder, chromium, tmp_path):
    by_run = {str(run.relative_to(folder)): run for run in runs(folder)}
    scalars = {run: curves(path) for run, path in by_run.items()}
    images = {tag: run for run, path in by_run.items() for tag in events(path).Tags()["images"]}
    tags = sorted({tag for each in scalars.values() for tag in each} | set(images))
    assert len(tags) >= 3
    drawn = {}
    with serve(folder) as url, Browser(*SIZE) as page:
        assert set(ask(url, "runs")) == set(by_run)
        for first in range(0, len(tags), CARDS):
            drawn |= photograph(page, url, tags[first : first + CARDS], tmp_path / f"{first // CARDS}.png")
    assert set(drawn) == set(tags)
    for tag, rows in drawn.items():
        if tag in images:
            encoded = events(by_run[images[tag]]).Images(tag)[-1]
            assert encoded.width * encoded.height in rows
            continue
        for run, shown, *_ in rows:
            assert tag in scalars[run]
            if math.isfinite(last := scalars[run][tag][-1][1]):
                assert number(shown) == pytest.approx(last, rel=1e-2, abs=1e-4)
    for picture in tmp_path.glob("*.png"):
        assert picture.stat().st_size > 20_000


def titles(run):
    """Of the charts in a run's layout."""
    (text,) = events(run).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    return [chart.title for category in Layout.FromString(text).category for chart in category.chart]


# Charts of each recipe's dashboard, among others; a short run of every one of them has curves in each.
DASHBOARDS = {
    "depth": ["accuracy/2 layers", "accuracy/20 layers", "accuracy/200 layers", "first_gradient_log10/200 layers"],
    "descent": [f"gap_log10/{surface}" for surface in ("bowl", "rosenbrock", "beale", "himmelblau")],
    "digits": ["loss", "accuracy", "gradient norm", "update / weight", "sharpness λ and its threshold"],
    "language_model": ["loss", "bits_per_byte"],
    "learning_rate": ["loss", "sweep/loss_log10", "sweep/sharpness"],
    "regression": ["loss", "convergence", "sharpness λ and its threshold"],
}


@pytest.mark.slow
def test_the_dashboard_is_on_the_page(folder, chromium):
    tags = {f"{tag} ({run.relative_to(folder)})" for run in runs(folder) for tag in curves(run)}
    with serve(folder) as url, Browser(1600, 3000) as page:
        drawn = charts(page, url, titles(folder / "version_0"))
    assert set(drawn) >= set(DASHBOARDS[folder.name])
    assert {curve for shown in drawn.values() for curve in shown} <= tags


@pytest.mark.slow
def test_a_card_that_stays_empty_is_noticed(chromium, tmp_path):
    """No false alarm, no false calm: a tag that nothing logged is missed."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer.add_scalar("loss/train", 0.5, 1)
    with serve(tmp_path) as url, Browser(*SIZE) as page:
        assert photograph(page, url, ["loss/train"], tmp_path / "page.png")["loss/train"][0][:2] == ["run", "0.5"]
        with pytest.raises(TimeoutError, match="loss/val"):
            photograph(page, url, ["loss/train", "loss/val"], tmp_path / "page.png", timeout=3)
