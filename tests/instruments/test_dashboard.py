"""The layout that TensorBoard opens on; all instruments from YAML, and as one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningCLI
from tensorboard.plugins.custom_scalar import layout_pb2

import torchcalc.instruments
from benchmarks.instruments import make
from tests.instruments.conftest import Regression, fit, loader, read, trainer_of
from tests.instruments.test_gradient_flow import TwoOptimizers
from tests.instruments.test_sharpness import Manual
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


class Named(Regression):
    """Logs under other names."""

    def __init__(self, form, **options):
        super().__init__()
        self.form, self.options = form, options

    def step(self, batch, stage):
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        options = self.options if stage == "train" else {}
        self.log(self.form.format(stage=stage), loss, batch_size=len(batch[0]), **options)
        self.log("on the bar only", loss, logger=False, prog_bar=True, batch_size=len(batch[0]))
        return loss


BOTH = dict(on_step=True, on_epoch=True)


@pytest.mark.parametrize(
    ("make", "tags"),
    [
        (Regression, ["loss/train", "loss/val"]),
        (lambda: Named("loss/{stage}", **BOTH), ["loss/train_epoch", "loss/train_step", "loss/val"]),
        (lambda: Named("{stage}_loss"), ["train_loss", "val_loss"]),
        (lambda: Named("{stage}_loss", **BOTH), ["train_loss_epoch", "train_loss_step", "val_loss"]),
        (lambda: Named("{stage}/loss"), ["train/loss", "val/loss"]),
        (lambda: Named("loss_{stage}", **BOTH), ["loss_train_epoch", "loss_train_step", "loss_val"]),
    ],
)
@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize("monitor", [LearningRate, LearningRateMonitor])
def test_the_newest_layout_shows_what_is_logged_and_no_empty_chart(tmp_path, make, tags, val, monitor):
    callbacks = {LearningRate(), monitor()} if monitor is LearningRateMonitor else {LearningRate()}
    fit(tmp_path, make(), GradientFlow(), Sharpness(), *callbacks, Dashboard(), val=val)
    first, *_, found = layouts(tmp_path)
    assert list(first) == list(found)[1:] == ["gradients and updates", "sharpness", "learning rate"]
    assert list(found["training"]) == ["loss"]
    logged = read(tmp_path).scalars
    for charts in found.values():
        for title, expressions in charts.items():
            assert any(re.search(each, tag) for each in expressions for tag in logged), title
    shown = sorted(tag for tag in logged if re.search(found["training"]["loss"][0], tag))
    assert shown == [tag for tag in tags if val or "val" not in tag]


def test_what_is_logged_later_gets_a_chart_later(tmp_path):
    class Later(Regression):
        def on_train_epoch_end(self):
            if self.current_epoch == 2:
                self.log("speed", 1.0)

    fit(tmp_path, Later(), Dashboard(), val=True, max_epochs=5)
    assert [list(found["training"]) for found in layouts(tmp_path)] == [["loss"], ["loss", "speed"]]


def test_groups_of_ones_own_and_charts_of_the_same_title():
    charts = [("a", "x", ["^p$"]), ("a", "x", ["^q$", "^p$"]), ("b", "x", ["^r$"])]
    found = layout(["lo.ss"], charts)
    ((kind, (expression,)),) = found.pop("training").values()
    tags = [
        "lo.ss",
        "lo.ss/train",
        "train/lo.ss",
        "val_lo.ss",
        "lo.ss_step",
        "test/lo.ss/0",
        "loss",
        "lo.ss2",
        "my_lo.ss",
    ]
    assert kind == "Multiline"
    assert [tag for tag in tags if re.search(expression, tag)] == tags[:6]
    assert found == {
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
    *_, found_layout = layouts(tmp_path)
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


@pytest.mark.parametrize("make", [Manual, TwoOptimizers])
def test_where_the_sharpness_cannot_be_measured_it_is_left_out(tmp_path, make):
    with pytest.warns(
        UserWarning, match=r"Instruments leaves the sharpness out, as sharpness=False .*: Sharpness: with man"
    ):
        fit(tmp_path, make(), Instruments(predictions=False), max_epochs=1)
    fit(tmp_path / "quiet", make(), Instruments(sharpness=False, predictions=False), max_epochs=1)
    for folder in (tmp_path, tmp_path / "quiet"):
        assert {"gradient_norm", "update_ratio", "lr"} == {tag.partition("/")[0] for tag in read(folder).scalars}
        assert list(layouts(folder)[-1]) == ["gradients and updates", "learning rate"]


def test_without_lightning_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['lightning'] = None; import torchcalc.instruments"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr.splitlines()[-1] == (
        "ImportError: torchcalc.instruments needs Lightning: pip install 'torchcalc[recipes]'"
    )


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
