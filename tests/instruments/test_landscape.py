"""Slices and planes against functions whose shape is known, and as a callback."""

from __future__ import annotations

import pytest
import torch

from tests.instruments.conftest import Regression, batches, fit, read
from torchcalc.instruments import Landscape, loss_plane, loss_slice
from torchcalc.instruments.figures import pixels


def test_slice_of_a_parabola():
    start, end = ({"a": torch.full((2,), v), "b": torch.tensor(v)} for v in (1.0, -1.0))
    line = loss_slice(lambda p: p["a"].square().sum() + p["b"] ** 2, start, end, low=0, high=2, points=5)
    assert line.losses.tolist() == pytest.approx([3 * (1 - 2 * t) ** 2 for t in (0.0, 0.5, 1.0, 1.5, 2.0)])
    pixels(line.figure())


def test_a_slice_marks_its_first_and_last_weights_where_they_are():
    line = loss_slice(lambda p: p["w"] ** 2, {"w": torch.tensor(2.0)}, {"w": torch.tensor(-1.0)})
    marks = [mark.get_xydata().tolist() for mark in line.figure().axes[0].lines[1:]]
    assert marks == [[pytest.approx([0.0, 4.0], abs=1e-6)], [pytest.approx([1.0, 1.0])]]


@pytest.mark.parametrize("resolution", [2, 3, 5, 21])
def test_the_slice_of_a_training_holds_both_ends(tmp_path, monkeypatch, resolution):
    found = []
    real = loss_slice
    where = "torchcalc.instruments.landscape.loss_slice"
    monkeypatch.setattr(where, lambda *a, **k: found.append(real(*a, **k)) or found[-1])
    fit(tmp_path, Regression(), Landscape(kind="slice", resolution=resolution), max_epochs=1)
    for end in (0.0, 1.0):
        assert (found[0].t - end).abs().min() < 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_finite_nowhere_can_be_drawn(value):
    path = [{"w": torch.tensor(x)} for x in ([1.0, 0.0], [0.0, 2.0], [0.0, 0.0])]
    plane = loss_plane(lambda p: p["w"].sum() * 0 + value, path, resolution=3)
    assert "finite nowhere" in [text.get_text() for text in plane.figure().axes[0].texts]
    pixels(plane.figure())
    pixels(loss_slice(lambda p: p["w"].sum() * 0 + value, path[0], path[1]).figure())


def test_plane_of_a_path_in_a_plane():
    """A path within two of five dimensions: the plane holds all of it, and distances in it are distances."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q[:2].float()
    flat = torch.tensor([[3.0, 1.0], [2.0, -1.0], [1.0, 0.5], [0.0, 0.0]]) @ basis
    path = [{"a": w[:2].reshape(2, 1), "b": w[2:]} for w in flat]
    plane = loss_plane(lambda p: torch.cat([p["a"].flatten(), p["b"]]).square().sum(), path, resolution=7)
    assert sum(plane.shares) == pytest.approx(1.0, abs=1e-5)
    assert plane.shares[0] > plane.shares[1]
    assert torch.cdist(plane.path, plane.path) == pytest.approx(torch.cdist(flat, flat).double(), abs=1e-4)
    assert plane.losses == pytest.approx(plane.x[None, :] ** 2 + plane.y[:, None] ** 2, abs=1e-4)
    assert bool(
        (
            (plane.path >= torch.stack([plane.x[0], plane.y[0]]))
            & (plane.path <= torch.stack([plane.x[-1], plane.y[-1]]))
        ).all()
    )
    pixels(plane.figure())


def test_shares_are_those_of_the_singular_values():
    path = list(torch.randn(6, 50, generator=torch.Generator().manual_seed(0)))
    squares = torch.linalg.svdvals(torch.stack(path[:-1]).double() - path[-1].double()) ** 2
    plane = loss_plane(lambda p: p["w"].sum(), [{"w": w} for w in path], resolution=2)
    assert plane.shares == pytest.approx([float(s / squares.sum()) for s in squares[:2]], rel=1e-4)


def test_a_straight_path_gets_a_second_direction():
    path = [{"w": torch.tensor([v, 0.0, 0.0])} for v in (2.0, 1.0, 0.0)]
    plane = loss_plane(lambda p: p["w"].square().sum(), path, resolution=3)
    assert plane.shares == pytest.approx((1.0, 0.0))
    assert plane.losses == pytest.approx(plane.x[None, :] ** 2 + plane.y[:, None] ** 2, abs=1e-5)


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ([torch.zeros(2)], {}, "1 points"),
        ([torch.zeros(2)] * 2, {}, "all its points are the same"),
        ([torch.zeros(2), torch.ones(2) * float("nan")], {}, "some weights are not finite"),
        ([torch.full((2,), float("inf")), torch.ones(2)], {}, "some weights are not finite"),
        ([torch.full((2,), 1e30), torch.zeros(2)], {}, "or too far apart"),
        ([torch.zeros(2), torch.ones(3)], {}, "point 1 has other names or shapes"),
        ([torch.zeros(2), torch.ones(2)], dict(resolution=1), "resolution=1"),
        ([torch.zeros(2), torch.ones(2)], dict(margin=0.0), "margin=0.0"),
    ],
)
def test_arguments_of_a_plane(path, options, says):
    with pytest.raises(ValueError, match=says):
        loss_plane(lambda p: p["w"].sum(), [{"w": w} for w in path], **options)


@pytest.mark.parametrize("kind", ["plane", "slice"])
def test_callback(tmp_path, kind):
    modules = [Regression(), Regression()]
    fit(tmp_path / "without", modules[0])
    fit(tmp_path, modules[1], Landscape(kind=kind, resolution=5))
    ((step, image),) = read(tmp_path).images["figures/landscape"]
    assert step == 7
    assert image.size == {"plane": (700, 550), "slice": (700, 400)}[kind]
    for p, q in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(p, q)


def test_the_callback_evaluates_the_trainings_loss_along_its_path(tmp_path, monkeypatch):
    found = []
    real = loss_plane
    monkeypatch.setattr("torchcalc.instruments.landscape.loss_plane", lambda *a, **k: found.append(a) or real(*a, **k))
    module = Regression()
    first = {f"module.{name}": p.detach().clone() for name, p in module.named_parameters()}
    fit(tmp_path, module, Landscape(max_snapshots=4, resolution=2, examples=None))
    ((loss, path),) = found
    assert [len(path), *path[0]] == [5, *first]  # of 8 steps every second, since there were more than 4; and the last
    assert all(torch.equal(path[0][name], first[name]) for name in first)
    x, y = batches()[0]
    assert loss(path[-1]).item() == pytest.approx(torch.nn.functional.mse_loss(module.net(x), y).item())


@pytest.mark.parametrize(
    "arguments",
    [dict(kind="volume"), dict(max_snapshots=2), dict(resolution=1), dict(examples=0), dict(every_n_steps=0)],
)
def test_arguments(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        Landscape(**arguments)
