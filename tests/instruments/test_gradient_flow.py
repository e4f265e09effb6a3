"""Gradient norms and update ratios: against a loop by hand, under accumulation, AMP, several optimizers, and resumed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

import torchcalc
from tests.instruments.conftest import Regression, batches, fit, group, loader, read, trainer_of
from torchcalc.instruments import (
    Dashboard,
    GradientFlow,
    Landscape,
    Predictions,
    UpdateRatio,
    gradient_norms,
    update_ratios,
)

LAYERS = ("net.0", "net.2")


def by_hand(module, steps, accumulate=1):
    """Norm of the gradient and length of the update relative to the weights, per step and layer, in float64."""
    module = copy.deepcopy(module)
    optimizer = module.make(module.parameters())
    data = batches() * 10
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        for x, y in data[step * accumulate : (step + 1) * accumulate]:
            (nn.functional.mse_loss(module.net(x), y) / accumulate).backward()
        layers = {f"net.{i}": list(module.net[i].parameters()) for i in (0, 2)}
        flat = {name: torch.cat([p.detach().double().flatten() for p in each]) for name, each in layers.items()}
        norms = {
            name: torch.cat([p.grad.double().flatten() for p in each]).norm().item() for name, each in layers.items()
        }
        optimizer.step()
        after = {name: torch.cat([p.detach().double().flatten() for p in each]) for name, each in layers.items()}
        ratios = {name: ((after[name] - flat[name]).norm() / flat[name].norm()).item() for name in layers}
        found.append((norms, ratios))
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_curves_are_those_of_a_loop_by_hand(tmp_path, optimizer, accumulate):
    module = Regression(optimizer=lambda params: getattr(torchcalc.optim, optimizer)(params, lr=0.05))
    truth = by_hand(module, 8 // accumulate, accumulate)
    fit(tmp_path, module, GradientFlow(), UpdateRatio(), accumulate_grad_batches=accumulate)
    found = read(tmp_path)
    for i, name in enumerate(("gradient_norm", "update_ratio")):
        curves = group(found, name)
        assert set(curves) == set(LAYERS)
        for layer in LAYERS:
            assert [step for step, _ in curves[layer]] == list(range(8 // accumulate))
            assert [v for _, v in curves[layer]] == pytest.approx([each[i][layer] for each in truth], rel=1e-4)
        ((step, image),) = found.images[f"figures/{name}"]
        assert step == 8 // accumulate - 1
        assert image.size == (800, 450)
        assert len(image.getcolors(10**6)) > 50


@pytest.mark.parametrize("n", [1, 3, 5])
def test_every_n_steps(tmp_path, n):
    fit(tmp_path, Regression(), GradientFlow(every_n_steps=n), UpdateRatio(every_n_steps=n))
    for name in ("gradient_norm", "update_ratio"):
        assert [step for step, _ in group(read(tmp_path), name)["net.0"]] == list(range(0, 8, n))


def test_plain_functions():
    module = Regression()
    (x, y), *_ = batches()
    nn.functional.mse_loss(module.net(x), y).backward()
    (norms, ratios), *_ = by_hand(Regression(), 1)
    assert list(gradient_norms(module)) == list(LAYERS)
    assert gradient_norms(module) == pytest.approx(norms, rel=1e-6)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.configure_optimizers().step()
    assert update_ratios(module, before) == pytest.approx(ratios, rel=1e-4)
    with pytest.raises(ValueError, match=r"before\['net.0.weight'\] has shape \(3,\), the parameter \(4, 3\)"):
        update_ratios(module, {name: p[0] for name, p in before.items()})
    module.net[0].bias.grad = module.net[0].weight.grad = None
    assert math.isnan(gradient_norms(module)["net.0"])


def test_gradients_are_unscaled(tmp_path):
    """GradScaler multiplies the loss by 2^10; an optimizer that unscales in its own step leaves its gradients multiplied."""

    class Scaled(MixedPrecision):
        def __init__(self):
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

        def autocast_context_manager(self):  # the gradients of float32
            return torch.autocast("cpu", enabled=False)

    for i, fused in enumerate((False, True)):
        module = Regression(optimizer=lambda params, fused=fused: torch.optim.SGD(params, lr=0.05, fused=fused))
        truth = by_hand(Regression(), 4)
        fit(tmp_path / str(i), module, GradientFlow(), max_epochs=1, plugins=[Scaled()])
        curves = group(read(tmp_path / str(i)), "gradient_norm")
        for layer in LAYERS:
            assert [v for _, v in curves[layer]] == pytest.approx([each[0][layer] for each in truth], rel=1e-4)


class TwoOptimizers(LightningModule):
    """Manual optimization: one part steps at even batches, the other at odd ones."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

    def training_step(self, batch, index):
        x, y = batch
        optimizer = self.optimizers()[index % 2]
        optimizer.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self.parts[index % 2](x), y))
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.parts]


@pytest.mark.parametrize("n", [1, 2])
def test_each_optimizer_is_measured_at_its_own_steps(tmp_path, n):
    fit(tmp_path, TwoOptimizers(), flow := GradientFlow(every_n_steps=n), UpdateRatio(every_n_steps=n))
    for name in ("gradient_norm", "update_ratio"):
        curves = group(read(tmp_path), name)
        assert [step for step, _ in curves["parts.0"]] == [0, 2, 4, 6]
        assert [step for step, _ in curves["parts.1"]] == [1, 3, 5, 7]
    assert flow.history.layers == ["parts.0", "parts.1"]


def test_curves_of_deep_networks_are_thinned_and_the_heat_map_is_not(tmp_path):
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(40)), nn.Linear(3, 1))
    fit(tmp_path, Regression(net), flow := GradientFlow(max_layers=5), max_epochs=1)
    assert list(group(read(tmp_path), "gradient_norm")) == [f"net.{i}" for i in (0, 10, 20, 30, 40)]
    assert flow.history.layers == [f"net.{i}" for i in range(41)]
    assert len(flow.history) == 4


def test_a_resumed_training_goes_on_with_the_heat_map(tmp_path):
    whole = fit(tmp_path / "whole", Regression(), GradientFlow(every_n_steps=3), max_epochs=3)
    trainer = fit(tmp_path / "half", Regression(), GradientFlow(every_n_steps=3), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = trainer_of(tmp_path / "half", GradientFlow(every_n_steps=3), max_epochs=3)
    again.fit(Regression(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    expected, found = (trainer.callbacks[0].history for trainer in (whole, again))
    assert expected.steps == found.steps == [0, 3, 6, 9]
    assert found.values == [pytest.approx(column, rel=1e-5) for column in expected.values]


def test_a_layer_that_is_frozen_is_not_measured(tmp_path):
    module = Regression()
    module.net[0].requires_grad_(False)
    fit(tmp_path, module, flow := GradientFlow(), UpdateRatio())
    assert list(group(read(tmp_path), "gradient_norm")) == list(group(read(tmp_path), "update_ratio")) == ["net.2"]
    assert all(math.isnan(column[0]) for column in flow.history.values)


def test_weights_of_zero_have_no_ratio(tmp_path):
    module = Regression()
    for p in module.net[2].parameters():
        nn.init.zeros_(p)
    fit(tmp_path, module, UpdateRatio(), max_epochs=1)
    assert [step for step, _ in group(read(tmp_path), "update_ratio")["net.2"]] == [1, 2, 3]


def test_they_change_nothing(tmp_path):
    modules = [Regression(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))) for _ in range(2)]
    for i, callbacks in enumerate(([], [GradientFlow(budget=None), UpdateRatio(budget=None)])):
        torch.manual_seed(1)
        fit(tmp_path / str(i), modules[i], *callbacks)
    for p, q in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(p, q)


def test_without_a_budget_it_draws_after_every_epoch(tmp_path):
    fit(tmp_path, Regression(), GradientFlow(budget=None))
    assert [step for step, _ in read(tmp_path).images["figures/gradient_norm"]] == [3, 7]


def test_an_interrupted_training_is_drawn(tmp_path):
    class Interrupted(Regression):
        def on_train_batch_start(self, batch, index):
            if index == 2:
                raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, Interrupted(), GradientFlow())
    ((step, _),) = read(tmp_path).images["figures/gradient_norm"]
    assert step == 1


def test_without_tensorboard_there_are_curves_only(tmp_path):
    says = "GradientFlow: TensorBoard's pages need a TensorBoardLogger, here is CSVLogger: only curves are written"
    with pytest.warns(UserWarning, match=says):
        fit(tmp_path, Regression(), GradientFlow(), logger=CSVLogger(tmp_path, name="", version="run"))
    assert "gradient_norm/net.0" in (tmp_path / "run/metrics.csv").read_text()
    for callback in (Landscape(), Predictions(), Dashboard()):  # which have no curves
        with pytest.warns(UserWarning, match=f"{type(callback).__name__}: .* here is CSVLogger: nothing is written"):
            fit(tmp_path, Regression(), callback, logger=CSVLogger(tmp_path, name=type(callback).__name__))


def test_without_a_logger_it_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="UpdateRatio: the trainer has no logger"):
        fit(tmp_path, Regression(), UpdateRatio(), logger=False)


def test_fast_dev_run(tmp_path):
    fit(tmp_path, Regression(), GradientFlow(), UpdateRatio(), fast_dev_run=2)


@pytest.mark.parametrize("cls", [GradientFlow, UpdateRatio])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(every_n_steps=0), "every_n_steps=0: must be at least 1"),
        (dict(max_layers=0), "max_layers=0: must be at least 1$"),
        (dict(max_layers=None), "max_layers=None: must be at least 1$"),
        (dict(columns=1), "columns=1: must be at least 2"),
        (dict(budget=0.0), "budget=0.0: must be a share"),
        (dict(budget=1.0), "budget=1.0: must be a share"),
    ],
)
def test_arguments(cls, arguments, says):
    with pytest.raises(ValueError, match=says):
        cls(**arguments)
