"""The layout that TensorBoard opens on; all instruments from YAML, and as one."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from tensorboard.plugins.custom_scalar import layout_pb2

import torchcalc.instruments
from benchmarks.instruments import make
from tests.instruments.conftest import Regression, fit, loader, read, trainer_of
from torchcalc.instruments import Dashboard, GradientFlow, Instruments, LearningRate, Sharpness, layout

CALLBACKS = sorted(
    name
    for name in torchcalc.instruments.__all__
    if isinstance(each := getattr(torchcalc.instruments, name), type) and issubclass(each, Callback)
)


def layouts(folder):
    """Section -> chart -> regular expressions, of every layout in the event file."""
    found = []
    for data in read(folder).tensors.get("custom_scalars__config__", []):
        proto = layout_pb2.Layout.FromString(data)
        found.append({s.title: {c.title: [*c.multiline.tag] for c in s.chart} for s in proto.category})
    return found


@pytest.mark.parametrize("val", [True, False])
def test_the_layout_is_written_once_and_shows_what_is_logged(tmp_path, val):
    fit(tmp_path, Regression(), GradientFlow(), Sharpness(), LearningRate(), Dashboard(), val=val, max_epochs=3)
    (found,) = layouts(tmp_path)
    assert list(found) == ["training", "gradients and updates", "sharpness", "learning rate"]
    assert next(iter(found["training"])) == "loss"
    tags = read(tmp_path).scalars
    for charts in found.values():
        for title, expressions in charts.items():
            assert any(re.search(each, tag) for each in expressions for tag in tags), title
    shown = [tag for tag in tags if re.search(found["training"]["loss"][0], tag)]
    assert shown == (["loss/val", "loss/train"] if val else ["loss/train"])


def test_groups_of_ones_own_and_charts_of_the_same_title():
    charts = [("a", "x", ["^p$"]), ("a", "x", ["^q$", "^p$"]), ("b", "x", ["^r$"])]
    assert layout(["lo.ss"], charts) == {
        "training": {"lo.ss": ["Multiline", [r"^lo\.ss(/|$)"]]},
        "a": {"x": ["Multiline", ["^p$", "^q$"]]},
        "b": {"x": ["Multiline", ["^r$"]]},
    }


def test_named_groups_are_written_at_once_and_in_order(tmp_path):
    fit(tmp_path, Regression(), Dashboard(groups=["speed", "loss"]), max_epochs=1)
    (found,) = layouts(tmp_path)
    assert list(found["training"]) == ["speed", "loss"]


@pytest.mark.parametrize("name", CALLBACKS)
def test_from_yaml(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train"])
    (tmp_path / "config.yaml").write_text(
        f"""
trainer:
  accelerator: cpu
  callbacks: [{{class_path: torchcalc.instruments.{name}}}]
"""
    )
    cli = LightningCLI(
        Regression, run=False, save_config_callback=None, seed_everything_default=0, args=["--config=config.yaml"]
    )
    found = [each for each in cli.trainer.callbacks if type(each).__name__ == name]
    assert len(found) == 1
    for key, value in vars(type(found[0])()).items():
        if isinstance(value, (int, float, str, bool)) and key not in ("started", "spent"):
            assert getattr(found[0], key) == value


def test_all_together(tmp_path):
    """One callback: every curve and figure of the parts; the training is not changed by it."""
    modules = [Regression(), Regression()]
    fit(tmp_path / "without", modules[0], val=True)
    trainer = fit(tmp_path, modules[1], Instruments(), val=True)
    for p, q in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(p, q)
    found = read(tmp_path)
    assert {tag.partition("/")[0] for tag in found.scalars} == {
        "epoch", "loss", "gradient_norm", "update_ratio", "lr", "sharpness",
    }  # fmt: skip
    assert set(found.images) == {"figures/gradient_norm", "figures/update_ratio", "figures/predictions"}
    (found_layout,) = layouts(tmp_path)
    assert list(found_layout) == ["training", "gradients and updates", "learning rate", "sharpness"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = trainer_of(tmp_path / "again", Instruments(), max_epochs=3)
    again.fit(Regression(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.callbacks[0].parts[0].history.steps == list(range(12))


def test_parts_can_be_left_out():
    names = [type(part).__name__ for part in Instruments(sharpness=False, predictions=False).parts]
    assert names == ["GradientFlow", "UpdateRatio", "LearningRate", "Dashboard"]
    with pytest.raises(ValueError, match="every_n_steps=0"):
        Instruments(every_n_steps=0)


def test_every_hook_of_a_part_is_forwarded():
    """A part that listens to another hook would otherwise be deaf inside Instruments."""
    hooks = {name for name in vars(Callback) if name.startswith("on_")} | {"setup", "teardown"}
    for part in Instruments().parts:
        listening = {name for name in hooks if getattr(type(part), name) is not getattr(Callback, name)}
        assert listening <= set(vars(Instruments)), type(part).__name__


def test_testing_after_training(tmp_path):
    class Tested(Regression):
        def test_step(self, batch):
            self.step(batch, "test")

    trainer = trainer_of(tmp_path, Instruments())
    trainer.fit(module := Tested(), loader(), loader())
    trainer.test(module, loader(), verbose=False)
    trainer.validate(module, loader(), verbose=False)
    assert len(read(tmp_path).images["figures/predictions"]) == 1


def test_the_benchmark_compares_the_same_training():
    *_, same = make(epochs=1)
    same()
