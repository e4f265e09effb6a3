"""What goes wrong in an instrument ends the instrument, and neither ends nor changes the training."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from tests.instruments.conftest import Regression, batches, fit, loader, read, trainer_of
from tests.instruments.test_predictions import Classes, class_batches
from torchcalc.instruments import (
    Dashboard,
    GradientFlow,
    Instruments,
    Landscape,
    LearningRate,
    LearningRateRangeTest,
    Predictions,
    Sharpness,
    UpdateRatio,
)


class NanOnce(Regression):
    """Loses its weights, and Adam's state, at the third step."""

    def __init__(self):
        super().__init__(optimizer=torch.optim.AdamW)

    def training_step(self, batch):
        return super().training_step(batch) * (math.nan if self.global_step == 2 else 1.0)


class Skips(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch) if batch_idx else None


class Diverges(Regression):
    def __init__(self, lr=1e6):
        super().__init__(nn.Linear(3, 1), optimizer=lambda params: torch.optim.SGD(params, lr=lr))


class Embeds(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 1))

    def training_step(self, batch):
        return self.net(batch[0].abs().long().clamp(max=3)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def broken(*args, **kwargs):
    raise OSError("the disk is full")


@pytest.mark.parametrize(
    ("make", "callback", "options", "says"),
    [
        (NanOnce, lambda: Sharpness(budget=None), {}, "Sharpness: ValueError: metric"),
        (Skips, lambda: Sharpness(budget=None), {}, r"Sharpness: ValueError: Skips\.training_step returned NoneType"),
        (Skips, Landscape, {}, r"Landscape: ValueError: Skips\.training_step returned NoneType"),
        (Skips, LearningRateRangeTest, {}, r"LearningRateRangeTest: ValueError: Skips\.training_step returned NoneType"),
        (Diverges, Landscape, dict(max_epochs=8), "Landscape: ValueError: path: some weights are not finite"),
        (lambda: Diverges(0.0), Landscape, {}, "Landscape: ValueError: path: all its points are the same"),
        (Classes, lambda: Predictions(classes=["a", "b"]), {}, "Predictions: ValueError: classes=2: the outputs, .*, are for 3"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*training_step` returned `None`")
def test_what_an_instrument_cannot_measure(tmp_path, make, callback, options, says):
    data = class_batches() if make is Classes else batches()
    modules = [make(), make()]
    trainer_of(tmp_path / "without", **options).fit(modules[0], loader(data), loader(data) if make is Classes else None)
    trainer = trainer_of(tmp_path, callback(), **options)
    with pytest.warns(UserWarning, match=says + ".*; it is switched off, and the training goes on") as told:
        trainer.fit(modules[1], loader(data), loader(data) if make is Classes else None)
    assert len([each for each in told if "switched off" in str(each.message)]) == 1
    assert trainer.state.finished
    for p, q in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("callback", "where"),
    [
        (GradientFlow, "gradient_flow.norms"),
        (GradientFlow, "instrument.add_figure"),
        (UpdateRatio, "update_ratio.norms"),
        (LearningRate, "learning_rate.learning_rates"),
        (LearningRateRangeTest, "learning_rate.range_test"),
        (Sharpness, "sharpness.batch_of"),
        (Sharpness, "sharpness.sharpness"),
        (Landscape, "landscape.batch_of"),
        (Landscape, "landscape.loss_plane"),
        (Predictions, "predictions.scatter_figure"),
        (Dashboard, "dashboard.layout"),
    ],
)
def test_anything_else_that_fails(tmp_path, monkeypatch, callback, where):
    module, _, name = where.rpartition(".")
    monkeypatch.setattr(import_module(f"torchcalc.instruments.{module}"), name, broken)
    with pytest.warns(UserWarning, match=f"{callback.__name__}: OSError: the disk is full; it is switched off") as told:
        trainer = fit(tmp_path, Regression(), callback(), val=True)
    assert len([each for each in told if "switched off" in str(each.message)]) == 1
    assert trainer.global_step == 8
    monkeypatch.undo()
    trainer.fit_loop.max_epochs = 3  # fitted again it is on again
    trainer.fit(trainer.lightning_module, loader(), loader())


class Breaks(Regression):
    def validation_step(self, batch):
        super().validation_step(batch)
        raise LookupError("no such batch")


def test_nothing_stays_after_a_training_that_raised(tmp_path):
    module, set_, landscape = Breaks(), Instruments(), Landscape()
    with pytest.raises(LookupError, match="no such batch"):
        fit(tmp_path, module, set_, landscape, val=True, num_sanity_val_steps=0)
    assert not any(each._forward_hooks for each in module.modules())
    for part in (*set_.parts, landscape):
        for name in ("batch", "vector", "output", "module", "hook"):
            kept = getattr(part, name, None)
            assert kept is None or isinstance(kept, str), f"{type(part).__name__}.{name}"
        assert not getattr(part, "before", None) and not getattr(part, "snapshots", None)


def test_an_interruption_gets_through(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("torchcalc.instruments.sharpness"), "sharpness", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, Regression(), Sharpness())


@pytest.mark.filterwarnings("ignore:.*training_step` returned `None`")
def test_the_other_parts_go_on(tmp_path):
    with pytest.warns(UserWarning, match="Sharpness: ValueError"):
        fit(tmp_path, Skips(), Instruments(), val=True)
    assert {"gradient_norm/net.0", "update_ratio/net.0", "lr"} <= set(read(tmp_path).scalars)


@pytest.mark.parametrize("make", [Embeds, Regression])
@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
@pytest.mark.filterwarnings(
    "ignore:Sharpness:UserWarning", "ignore:Landscape:UserWarning"
)  # rounding may be too coarse
def test_any_kind_of_number(tmp_path, make, precision):
    fit(tmp_path, make(), Instruments(), Landscape(resolution=3), precision=precision, max_epochs=1)
    assert {"gradient_norm", "update_ratio", "lr"} <= {tag.partition("/")[0] for tag in read(tmp_path).scalars}
