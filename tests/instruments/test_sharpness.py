"""Sharpness and its threshold against dense Hessians; nothing of the training is touched."""

from __future__ import annotations

import math
import random
import re
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric

import torchcalc
from tests.instruments.conftest import Regression, batches, fit, group, read
from tests.instruments.test_gradient_flow import TwoOptimizers
from torchcalc.calculus import training_loss
from torchcalc.instruments import (
    GradientFlow,
    Landscape,
    LearningRate,
    LearningRateRangeTest,
    Sharpness,
    UpdateRatio,
    gradient_norms,
    sharpness,
)
from torchcalc.instruments.objective import Objective, batch_of
from torchcalc.instruments.sharpness import largest_stable

ACCURATE = dict(budget=None, examples=None, tolerance=1e-4, max_products=100)


def dense(module, optimizer):
    """The largest eigenvalue of P^-1/2·H·P^-1/2 on the first batch, in float64."""
    x, y = (t.double() for t in batches()[0])
    parameters = {name: p.detach().double() for name, p in module.net.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def f(flat):
        pieces = {k: v.view(p.shape) for (k, p), v in zip(parameters.items(), flat.split(sizes), strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(module.net, pieces, x), y)

    hessian = torch.func.hessian(f)(torch.cat([p.flatten() for p in parameters.values()]))
    scale = torch.ones(sum(sizes), dtype=torch.float64)
    if isinstance(optimizer, torch.optim.Adam):
        states = [(p, optimizer.state[p]) for p in module.parameters()]
        v = [s["exp_avg_sq"].double() / (1 - 0.999 ** s["step"].item()) for _, s in states]
        scale = 1 / (torch.cat([each.flatten() for each in v]).sqrt() + 1e-8).sqrt()
    return torch.linalg.eigvalsh(scale[:, None] * hessian * scale).max().item()


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.02), lambda s: 2 / s),
        (lambda params: torchcalc.optim.SGD(params, lr=0.02, momentum=0.5, weight_decay=0.1), lambda s: 3 / (s + 0.1)),
        (lambda params: torch.optim.Adam(params, lr=0.003), lambda s: 2 * 1.9 / (0.1 * s)),
    ],
    ids=["SGD", "momentum", "Adam"],
)
def test_curves_against_the_dense_hessian(tmp_path, make, limit):
    class Watched(Regression):
        def on_train_batch_end(self, *args):
            self.truth.append(dense(self, self.trainer.optimizers[0]))

    module = Watched(optimizer=make)
    module.truth = []
    fit(tmp_path, module, Sharpness(**ACCURATE))
    curves = group(read(tmp_path), "sharpness")
    assert set(curves) == {"lambda", "threshold", "lr", "lr_limit"}
    assert [step for step, _ in curves["lambda"]] == list(range(8))
    assert [v for _, v in curves["lambda"]] == pytest.approx(module.truth, rel=1e-3)
    assert [v for _, v in curves["lr_limit"]] == pytest.approx([limit(s) for s in module.truth], rel=1e-3)
    lr = module.optimizers().param_groups[0]["lr"]
    assert [v for _, v in curves["lr"]] == pytest.approx([lr] * 8)
    assert [limit(v) for _, v in curves["threshold"]] == pytest.approx([lr] * 8, rel=1e-3)


class Busy(LightningModule):
    """All that a measurement could disturb: dropout, batch norm, metrics, logs, a counter of batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.mean(loss.detach())
        self.log("loss", loss, prog_bar=True)
        self.log_dict({"mean": self.mean, "norm": loss**2}, on_epoch=True, on_step=False)
        return {"loss": loss, "extra": None}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_it_changes_nothing(tmp_path):
    modules = [Busy(), Busy()]
    for i, callbacks in enumerate(([], [Sharpness(budget=None)])):
        torch.manual_seed(1)
        fit(tmp_path / str(i), modules[i], *callbacks)
    for (name, a), b in zip(modules[0].state_dict().items(), modules[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    without, measured = (read(tmp_path / str(i)).scalars for i in range(2))
    assert len(group(read(tmp_path / "1"), "sharpness")["lambda"]) == 8
    assert {tag: v for tag, v in measured.items() if not tag.startswith("sharpness")} == without


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: float(torch.rand(()))], ids=["random", "numpy", "torch"]
)
@pytest.mark.parametrize(
    "callback",
    [lambda: Sharpness(budget=None), lambda: Landscape(resolution=3), LearningRateRangeTest],
    ids=["λ", "plane", "range"],
)
@pytest.mark.filterwarnings("ignore:LearningRateRangeTest. no rate of the range:UserWarning")  # all it sees is noise
def test_random_numbers_are_left_as_they_are(tmp_path, monkeypatch, draw, callback):
    class Mixed(Regression):
        def training_step(self, batch):
            drawn.append(draw())
            return drawn[-1] * super().training_step(batch)

    monkeypatch.setattr("torchcalc.instruments.learning_rate.scale_rates", lambda *args: None)
    found = []
    for i, callbacks in enumerate(([], [callback()])):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        drawn: list[float] = []
        fit(tmp_path / str(i), module := Mixed(), *callbacks)
        found.append([*module.parameters(), torch.tensor([random.random(), np.random.rand(), torch.rand(())])])
    assert len(drawn) > 8
    for p, q in zip(*found, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "make",
    [
        partial(torchcalc.optim.GradientDescent, lr=1e-3),
        partial(torchcalc.optim.GradientDescent, lr=0.1, backtrack=True),
        partial(torch.optim.LBFGS, lr=0.01, max_iter=3),
    ],
    ids=["GradientDescent", "backtracking", "LBFGS"],
)
@pytest.mark.filterwarnings("ignore:Sharpness. .*no stability limit is known:UserWarning")
def test_an_optimizer_that_calls_its_closure_several_times_is_measured_once_a_step(tmp_path, make):
    module, begin = Regression(optimizer=make), Regression()
    fit(tmp_path, module, Sharpness(**ACCURATE), UpdateRatio(), GradientFlow(), LearningRate(), max_epochs=1)
    found = read(tmp_path)
    for tag in ("sharpness/lambda", "update_ratio/net.0", "gradient_norm/net.0", "lr"):
        assert [step for step, _ in found.scalars[tag]] == list(range(4)), tag
    nn.functional.mse_loss(begin.net(batches()[0][0]), batches()[0][1]).backward()
    assert found.scalars["gradient_norm/net.0"][0][1] == pytest.approx(gradient_norms(begin)["net.0"], rel=1e-5)
    assert found.scalars["sharpness/lambda"][-1][1] == pytest.approx(dense(module, None), rel=1e-3)


def test_it_pays_off_a_measurement_before_the_next(tmp_path, monkeypatch):
    callback = Sharpness(budget=0.1)
    clock = iter(range(10**6))
    monkeypatch.setattr("torchcalc.instruments.instrument.time.perf_counter", lambda: float(next(clock)))
    fit(tmp_path, Regression(), callback, max_epochs=20)
    steps = [step for step, _ in group(read(tmp_path), "sharpness")["lambda"]]
    assert steps[0] == 0  # at once
    assert callback.spent <= 0.1 * callback.elapsed() + callback.dearest
    assert 1 < len(steps) < 20


def test_an_optimizer_of_unknown_stability_gets_the_plain_hessian(tmp_path):
    module = Regression(optimizer=lambda params: torchcalc.optim.Lion(params, lr=1e-3))
    with pytest.warns(UserWarning, match="Sharpness: TypeError: .*no stability limit is known for Lion") as told:
        fit(tmp_path, module, Sharpness(**ACCURATE), max_epochs=1)
    assert len([each for each in told if "Sharpness" in str(each.message)]) == 1
    assert set(group(read(tmp_path), "sharpness")) == {"lambda", "lr"}


def test_second_derivatives_by_differences_are_told_once(tmp_path):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)

    class Tanh(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    net = nn.Sequential(nn.Linear(3, 4), Tanh(), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match="Sharpness: the Hessian is taken by differences") as told:
        fit(tmp_path, Regression(net), Sharpness(**ACCURATE), max_epochs=1)
    assert len([each for each in told if "Sharpness" in str(each.message)]) == 1


def test_frozen_in_mid_training(tmp_path):
    class Freezing(Regression):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch == 0)

    fit(tmp_path, Freezing(), Sharpness(**ACCURATE))
    assert len(group(read(tmp_path), "sharpness")["lambda"]) == 8


class Manual(TwoOptimizers):
    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss_of(batch))
        optimizer.step()

    def loss_of(self, batch):
        return nn.functional.mse_loss(self.parts[0](batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parts[0].parameters(), lr=0.1)


def test_manual_optimization(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"with manual optimization .*Sharpness\(objective='...'\)"):
        fit(tmp_path / "refused", Manual(), Sharpness())
    fit(tmp_path, module := Manual(), Sharpness(objective="loss_of", **ACCURATE), max_epochs=1)
    x, _ = (t.double() for t in batches()[0])
    x = torch.cat([x, torch.ones(8, 1)], 1)
    truth = torch.linalg.eigvalsh(2 * x.T @ x / 8).max().item()  # of the mean square of a linear layer
    assert group(read(tmp_path), "sharpness")["lambda"][-1][1] == pytest.approx(truth, rel=1e-3)
    assert module.parts[1].weight.grad is None


def test_refusals(tmp_path):
    with pytest.raises(MisconfigurationException, match="objective='nothing': Regression has no such method"):
        fit(tmp_path, Regression(), Sharpness(objective="nothing"))
    two = TwoOptimizers()
    two.loss_of = lambda batch: None
    with pytest.raises(MisconfigurationException, match="there are 2 optimizers"):
        fit(tmp_path, two, Sharpness(objective="loss_of"))

    class Vector(Regression):
        def losses(self, batch):
            return batch[0]

    with pytest.warns(UserWarning, match=r"Vector.losses returned shape \(8, 3\): it must return a scalar loss"):
        fit(tmp_path, Vector(), Sharpness(objective="losses"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(every_n_steps=0), "every_n_steps=0"),
        (dict(budget=2.0), "budget=2.0"),
        (dict(examples=0), "examples=0"),
        (dict(tolerance=0.0), "tolerance=0.0"),
        (dict(max_products=0), "max_products=0: must be at least 1$"),
        (dict(max_products=None), "max_products=None: must be at least 1$"),
    ],
)
def test_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        Sharpness(**arguments)


@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0, 9.0])
def test_threshold_is_the_inverse_of_the_limit(decay):
    assert largest_stable(lambda s: 2 / (s + decay), 0.2) == pytest.approx(10 - decay, rel=1e-4)
    assert math.isnan(largest_stable(lambda s: 2 / (s + 11), 0.2))
    assert largest_stable(lambda s: 2 / s, 0.0) == math.inf


def test_plain_function_starts_from_the_last_vector():
    module = Regression()
    loss = training_loss(module.net, nn.functional.mse_loss, batches())
    optimizer, parameters = module.configure_optimizers(), dict(module.net.named_parameters())
    cold = sharpness(loss, optimizer, parameters, tolerance=1e-4, max_products=100)
    warm = sharpness(loss, optimizer, parameters, start=cold.vector)
    assert warm.value == pytest.approx(cold.value, rel=5e-3)
    assert sharpness(loss, optimizer, parameters).value < 0.9 * cold.value


def test_arguments_of_the_plain_function():
    module = Regression()
    loss = training_loss(module.net, nn.functional.mse_loss, batches())
    parameters = dict(module.net.named_parameters())
    with pytest.raises(ValueError, match="optimizer: it trains none of the parameters"):
        sharpness(loss, Regression().configure_optimizers(), parameters)
    with pytest.raises(ValueError, match=r"parameters: the loss knows no net.0.weight, .*; its own are 0.weight, "):
        sharpness(loss, module.configure_optimizers(), dict(module.named_parameters()))


def test_a_batch_is_cut_and_copied():
    x, lengths = torch.arange(8.0), torch.arange(3)
    batch = {"x": (x, [x[:, None], "text"]), "other": lengths, "n": 8}
    found = batch_of(batch, 2)
    assert found["x"][0].tolist() == [0.0, 1.0]
    assert found["x"][1][0].shape == (2, 1)
    assert found["x"][1][1] == "text"
    assert found["other"].tolist() == [0, 1, 2]
    assert found["n"] == 8
    x.zero_()
    assert found["x"][0].tolist() == [0.0, 1.0]


class Steps(Regression):
    """What Lightning passes to training_step, and what it does not."""

    def batch_only(self, batch):
        return super().training_step(batch)

    def keyword_only(self, batch, *, scale=1.0):
        return scale * self.batch_only(batch)

    def any_name(self, batch, i, scale=1.0):
        return scale * self.batch_only(batch) + i

    def all_of_them(self, batch, batch_idx, dataloader_idx, scale=1.0):
        return scale * self.batch_only(batch) + batch_idx + dataloader_idx

    def anything(self, *args, scale=1.0):
        return scale * self.batch_only(args[0]) + args[1]


@pytest.mark.parametrize("method", ["batch_only", "keyword_only", "any_name", "all_of_them", "anything"])
def test_an_objective_gets_the_indices_and_nothing_else(method):
    module = Steps()
    x, y = batches()[0]
    assert torch.equal(Objective(module, method)((x, y)), nn.functional.mse_loss(module.net(x), y))


def test_a_threshold_far_above_does_not_flatten_the_sharpness():
    charts = {title: tags for _, title, tags in Sharpness().charts()}
    seen = ["sharpness/lambda", "sharpness/threshold", "sharpness/lr", "sharpness/lr_limit"]
    alone = [[tag for tag in seen if any(re.match(each, tag) for each in tags)] for tags in charts.values()]
    assert ["sharpness/lambda"] in alone and ["sharpness/lambda", "sharpness/threshold"] in alone


def test_an_objective_puts_back_what_the_instance_logs_by():
    module, logged = Busy(), []
    module.log = own = lambda name, value, **options: logged.append(name)
    Objective(module)(batches()[0])
    assert module.log is own and not logged and "log_dict" not in vars(module)
    with pytest.raises(RuntimeError):
        Objective(module)((torch.ones(2, 7), torch.ones(2, 1)))
    assert module.log is own


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside held at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and (key := storage.data_ptr()) and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, key)
        return out

    def freed(self, key):
        self.now -= self.sizes.pop(key, 0)


@pytest.mark.parametrize(("make", "copies"), [(torch.optim.SGD, 11), (torch.optim.Adam, 15)])
def test_memory_is_bounded(make, copies):
    """In copies of the weights, of which one are the weights themselves, one the last vector, one Adam's state."""
    net = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Tanh(), nn.Linear(300, 1, bias=False))
    weights = 4 * sum(p.numel() for p in net.parameters())
    optimizer = make(net.parameters(), lr=1e-3)
    loss = training_loss(net, nn.functional.mse_loss, (torch.randn(4, 300), torch.randn(4, 1)))
    loss(dict(net.named_parameters())).backward()
    optimizer.step()
    parameters = dict(net.named_parameters())
    start = sharpness(loss, optimizer, parameters).vector
    for products in (4, 40):
        with Live() as live:
            sharpness(loss, optimizer, parameters, start=start, max_products=products, tolerance=1e-6)
        assert live.peak <= (copies + 0.5) * weights


def test_an_objective_logs_nothing_and_restores_metrics():
    module = Busy()
    module.mean(torch.tensor(5.0))
    Objective(module)(batches()[0])
    assert module.mean.compute() == 5.0
    assert "log" not in vars(module)
