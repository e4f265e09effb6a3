"""What a layer is, and norms against float64, also where float32 fails."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchcalc.instruments import DepthHistory
from torchcalc.instruments.figures import pixels
from torchcalc.instruments.history import _short
from torchcalc.instruments.layers import layers_of, norms


def test_layers_in_order_of_registration_without_wrappers():
    tied = nn.Linear(2, 2)
    model = nn.ModuleDict({"b": nn.Sequential(tied, nn.ReLU(), tied), "a": nn.LayerNorm(2)})
    model.scale = nn.Parameter(torch.ones(()))
    assert {name: len(each) for name, each in layers_of(model).items()} == {"ModuleDict": 1, "b.0": 2, "a": 2}
    wrapped = nn.ModuleDict({"_orig_mod": nn.Linear(1, 1)})
    assert list(layers_of(nn.Sequential(wrapped))) == ["0"]
    tied.requires_grad_(False)
    assert list(layers_of(model)) == ["ModuleDict", "a"]
    assert list(layers_of(model, frozen=True)) == ["ModuleDict", "b.0", "a"]
    assert list(layers_of(model, [model.scale])) == ["ModuleDict"]


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-20, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_norms_against_float64(scale, dtype):
    x, y = (torch.randn(n, dtype=torch.float64) * scale for n in (50, 7))
    x, y = x.to(dtype), y.to(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    truth = math.hypot(torch.linalg.vector_norm(x.to(wide)).item(), torch.linalg.vector_norm(y.to(wide)).item())
    assert norms({"a": [x, y], "b": []})["a"] == pytest.approx(truth, rel=1e-6)


def test_norms_of_what_is_special():
    sparse = torch.sparse_coo_tensor([[1, 1, 3]], torch.tensor([1.0, 2.0, 4.0]), (5,), check_invariants=True)
    found = norms({"sparse": [sparse], "zero": [torch.zeros(3)], "inf": [torch.tensor(math.inf)], "none": []})
    assert found["sparse"] == 5.0  # 1 + 2 at the same place
    assert (found["zero"], found["inf"]) == (0.0, math.inf)
    assert math.isnan(found["none"])
    assert math.isnan(norms({"nan": [torch.tensor(math.nan)]})["nan"])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 100, 1000])
def test_columns_stay_few_and_evenly_spaced(count):
    history = DepthHistory(columns=8)
    for step in range(count):
        history.add(step, {"a": step + 1.0})
    assert len(history) <= 8
    assert history.steps == list(range(0, count, history.stride))
    assert [column[0] for column in history.values] == [step + 1.0 for step in history.steps]
    assert len(history) > 4 or count < 8


def test_layers_of_one_step_make_one_column_and_late_ones_leave_gaps():
    history = DepthHistory()
    history.add(0, {"a": 1.0})
    history.add(0, {"b": 2.0})
    history.add(5, {"c": 3.0, "a": 4.0})
    assert (history.steps, history.layers) == ([0, 5], ["a", "b", "c"])
    again = DepthHistory()
    again.load_state_dict(history.state_dict())
    again.add(6, {"b": 5.0})
    assert str(again.values) == "[[1.0, 2.0, nan], [4.0, nan, 3.0], [nan, 5.0, nan]]"


@pytest.mark.parametrize("centre", [None, 1e-3])
@pytest.mark.parametrize("value", [0.0, 1.0, math.inf, math.nan, 1e-300])
def test_any_number_can_be_drawn(value, centre):
    history = DepthHistory()
    history.add(3, {"a": value, "a very long name of a layer that does not fit": 1e-3})
    assert pixels(history.figure("x", centre=centre)).shape == (450, 800, 3)
    history.add(4, {"a": value})
    assert pixels(history.figure("x", centre=centre)).std() > 10


def test_the_heat_map_shows_depth_downwards_and_time_to_the_right():
    history = DepthHistory()
    for step in range(4):
        history.add(step, {"first": 1.0, "last": 1e3 if step == 3 else 1.0})
    figure = history.figure("x")
    image = pixels(figure)
    mesh = figure.axes[0].collections[0]
    corners = mesh.get_coordinates()
    assert corners.shape == (3, 5, 2)  # in inches, from below

    def colour(row, column):
        x, y = (corners[row : row + 2, column : column + 2].mean((0, 1)) * 100).round().astype(int)
        return image[-y, x].tolist()

    assert colour(0, 0) == colour(0, 3) == colour(1, 0) != colour(1, 3)
    assert corners[0, 0, 1] > corners[1, 0, 1]
    assert corners[0, 0, 0] < corners[0, 1, 0]
    words = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert words["first"][1] > words["last"][1]
    assert words["0"][0] < words["3"][0]


BERT = [
    "bert.embeddings.word_embeddings",
    *(
        f"bert.encoder.layer.{i}.{name}"
        for i in range(12)
        for name in ("attention.output.LayerNorm", "output.LayerNorm")
    ),
    "cls.predictions.transform.dense",
]
SEQ2SEQ = [
    f"model.{part}.layers.{i}.{name}"
    for part in ("encoder", "decoder")
    for i in range(60)
    for name in ("self_attn_layer_norm", "final_layer_norm", "self_attention.output_projection")
]


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["net.0", "net.2"], "net.0"),
        (BERT, "b.embeddings.word_embeddings"),
        (SEQ2SEQ, "e.l.0.self_attn_layer_norm"),
        ([f"model.encoder.blocks.{i}.attention.norm" for i in range(3)], "0.attention.norm"),
        (["a very long name of a layer that does not fit", "a"], "a very long na… does not fit"),
    ],
)
def test_names_of_layers_are_short_and_differ(names, first):
    history = DepthHistory()
    history.add(0, dict.fromkeys(names, 1.0))
    short = _short(names)
    assert short[0] == first
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= 28
    assert first in [text.get_text() for text in history.figure("x").axes[0].texts]


@pytest.mark.parametrize(
    ("value", "says"), [(0.0, "zero"), (math.inf, "infinite"), (math.nan, "not measured"), (1.0, None)]
)
def test_the_heat_map_says_what_its_colours_mean(value, says):
    history = DepthHistory()
    history.add(0, {"a": 1.0, "b": 1.0})
    history.add(1, {"a": 2.0, "b": value})
    figure = history.figure("x")
    words = {"zero", "infinite", "not measured"} & {text.get_text() for text in figure.axes[0].texts}
    assert words == ({says} if says else set())
    if says:
        image = pixels(figure)
        corners = figure.axes[0].collections[0].get_coordinates()
        x, y = (corners[1:3, 1:3].mean((0, 1)) * 100).round().astype(int)
        x0, y0 = (figure.axes[0].patches[-1].get_xy()[i] * 100 + 5 for i in (0, 1))
        assert image[-round(y0), round(x0)].tolist() == image[-y, x].tolist()


def test_an_empty_history_cannot_be_drawn():
    with pytest.raises(ValueError, match="the history is empty"):
        DepthHistory().figure("x")
