"""Contours with paths on them, and the animation."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from torchcalc.convergence import SURFACES
from torchcalc.instruments import animate_paths, contour_figure
from torchcalc.instruments.figures import new_figure, pixels

BOUNDS = (-2.0, 2.0, -1.0, 3.0)


def bowl(p):
    return p[..., 0] ** 2 + 10 * p[..., 1] ** 2


def lines(figure):
    return {
        line.get_label(): line.get_xydata() for line in figure.axes[0].lines if not line.get_label().startswith("_")
    }


def test_paths_and_minima_are_drawn_where_they_are():
    paths = {"a": torch.tensor([[1.0, 2.0], [0.5, 1.0]]), "b": torch.tensor([[-1.0, 0.0]], requires_grad=True)}
    figure = contour_figure(bowl, BOUNDS, paths, [(0, 0), (1, 1)], title="bowl")
    drawn = lines(figure)
    assert drawn["a"].tolist() == paths["a"].tolist()
    assert drawn["b"].tolist() == [[-1.0, 0.0]]
    assert drawn["minimum"].tolist() == [[0.0, 0.0]]
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["a", "b", "minimum"]
    assert (*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim()) == BOUNDS
    assert pixels(figure).shape == (550, 700, 3)


def test_a_path_that_diverges_is_cut():
    away = torch.tensor([[1.0, 1.0], [-3.0, 1.0], [1e30, 1.0], [0.0, 0.0]])
    figure = contour_figure(bowl, BOUNDS, {"far": away, "nan": away.clone().index_fill(0, torch.tensor(2), math.nan)})
    far = lines(figure)["far"]
    assert far[:2].tolist() == away[:2].tolist()
    assert len(far) == 3
    assert 100 < far[2, 0] < 1000
    assert far[2, 1] == 1.0
    assert len(lines(figure)["nan"]) == 2
    pixels(figure)


def test_any_surface_can_be_drawn():
    for f in (
        lambda p: torch.zeros(p.shape[:-1]),
        lambda p: p[..., 0].log(),
        lambda p: 1e300 * bowl(p),
        lambda p: p[..., 0] * 1e-300,
        lambda p: torch.where(p[..., 0] > 0, math.inf, 1.0),
    ):
        pixels(contour_figure(f, BOUNDS, resolution=21))


@pytest.mark.parametrize(
    ("f", "title", "shown"),
    [(bowl, None, "bowl"), (SURFACES["beale"], None, "beale"), (lambda p: bowl(p), None, ""), (bowl, "mine", "mine")],
)
def test_the_title_says_which_surface(f, title, shown, tmp_path, monkeypatch):
    assert contour_figure(f, BOUNDS, title=title, resolution=5).axes[0].get_title() == shown
    titles = []
    monkeypatch.setattr("torchcalc.instruments.contours.draw_surface", lambda *args: titles.append(args[4]))
    animate_paths(f, BOUNDS, {"a": torch.zeros(1, 2)}, tmp_path / "walk.gif", title=title, resolution=5)
    assert titles == [shown]


def test_on_axes_of_ones_own():
    figure, axes = new_figure(8, 4, columns=2)
    for ax in axes:
        assert contour_figure(bowl, BOUNDS, ax=ax) is figure
    assert pixels(figure).shape == (400, 800, 3)


def test_animation(tmp_path):
    paths = {
        "long": torch.linspace(0, 1, 31)[:, None] * torch.tensor([1.5, 2.0]),
        "short": torch.tensor([[1.0, 1.0]] * 3),
    }
    file = animate_paths(
        bowl, BOUNDS, paths, tmp_path / "new/walk.gif", frames=7, resolution=21, dpi=50, frames_per_second=10
    )
    with Image.open(file) as film:
        assert film.size == (300, 240)
        assert film.n_frames >= 7
        seen = []
        for i in range(film.n_frames):
            film.seek(i)
            seen.append(film.convert("RGB").tobytes())
        assert len(set(seen)) == 7
        assert film.info["duration"] >= 100


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(bounds=(1, 0, 0, 1)), "bounds=.*x0 < x1"),
        (dict(paths={"a": torch.zeros(3)}), r"paths\['a'\] has shape \(3,\)"),
        (dict(paths={"a": torch.zeros(0, 2)}), r"shape \(0, 2\)"),
        (dict(paths={"a": torch.full((1, 2), math.nan)}), "far out of bounds"),
        (dict(resolution=1), "resolution=1"),
        (dict(levels=1), "levels=1"),
        (dict(f=lambda p: p), r"f maps shape \(201, 201, 2\)"),
        (dict(f=lambda p: p[..., 0] * math.nan), "finite nowhere"),
    ],
)
def test_arguments(change, says):
    with pytest.raises(ValueError, match=says):
        contour_figure(**({"f": bowl, "bounds": BOUNDS} | change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(path="walk.mp4"), "name it 'walk.gif'"),
        (dict(paths={}), "paths is empty"),
        (dict(frames=0), "frames=0"),
    ],
)
def test_arguments_of_the_animation(change, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        animate_paths(**({"f": bowl, "bounds": BOUNDS, "paths": {"a": torch.zeros(1, 2)}, "path": "walk.gif"} | change))
    assert not list(tmp_path.iterdir())
