"""Which learning rate? A range test, then one net trained at learning rates over five decades, beside the prediction.

Near a minimum, and anywhere for a short while, a loss is a quadratic; on a quadratic of sharpness λ, the largest eigenvalue
of its Hessian, gradient descent converges up to lr = 2/λ and diverges beyond (``torchcalc.convergence.stability_limit`` has
the limits of momentum and others). λ is known before training starts, and so is the prediction. It is wrong where λ
changes on the way: full-batch training sharpens until 2/λ comes down to the lr (Cohen et al. 2021, arXiv:2103.00065), and
beyond the limit a net can be thrown to where the loss is flatter, and settle there (Lewkowycz et al. 2020,
arXiv:2003.02218). So λ is measured on the way as well, and the figure says where it crossed the line.
"""

import math
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer

from recipes.cli import RecipeCLI
from recipes.data import WholeDigits
from recipes.errors import fail
from recipes.learning_rate_figure import Run, sweep_figures, sweep_markdown, sweep_table, write_curves
from torchcalc import nn as calc
from torchcalc.calculus import Curvature, curvature, training_loss
from torchcalc.convergence import RangeTest, range_test, stability_limit
from torchcalc.optim import SGD, GradientDescent


class Perceptron(nn.Sequential):
    """A smooth net with one hidden layer, (N, 1, 8, 8) -> (N, 10)."""

    def __init__(self, width: PositiveInt = 32):
        super().__init__(nn.Flatten(), calc.Linear(64, width), calc.Tanh(), calc.Linear(width, 10))


class Sweep(LightningModule):
    """Copies of one net, each with a learning rate of its own; the gradient of the sum of their losses is each one's own.

    Args:
        net: the net to start from.
        loss: loss(output, target).
        low: smallest learning rate.
        high: largest learning rate.
        per_decade: learning rates in each decade.
        sharpness_every: steps between two measurements of the sharpness of each copy.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: nn.Module,
        low: PositiveFloat,
        high: PositiveFloat,
        per_decade: PositiveInt = 5,
        sharpness_every: PositiveInt = 25,
    ):
        super().__init__()
        if low >= high:
            raise ValueError(f"low: {low}; it must be below high, which is {high}")
        decades = math.log10(high / low)
        count = math.ceil(decades * per_decade - 1e-9) + 1
        self.runs = [Run(lr=low * 10 ** (decades * i / (count - 1))) for i in range(count)]
        self.nets = nn.ModuleList(deepcopy(net) for _ in self.runs)
        self.loss, self.sharpness_every = loss, sharpness_every
        self.losses: list[Tensor] = []  # one vector per step
        self.range_test: RangeTest | None = None

    def on_fit_start(self) -> None:
        """Give each net its learning rate; before the first step, test the range and predict."""
        data = self.trainer.datamodule.train  # type: ignore[attr-defined]
        self.batch = tuple(tensor.to(self.device) for tensor in data.tensors)
        optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
        if not isinstance(optimizer, SGD | GradientDescent | torch.optim.SGD):
            fail(f"optimizer: {type(optimizer).__name__}'s limit moves with its state; use SGD or GradientDescent")
        if getattr(optimizer, "backtrack", False):
            fail("optimizer.backtrack: true finds steps of its own, and a sweep compares given ones; set it to false")
        if self.trainer.estimated_stepping_batches < 4:
            fail(f"data.steps: {self.trainer.estimated_stepping_batches} in all; a curve of at least 4 has a verdict")
        [group] = optimizer.param_groups
        if self.range_test is None:
            self.predict(optimizer, group)
        for run in self.runs:  # a checkpoint's vectors and losses are on the CPU
            run.vector = run.vector and {name: part.to(self.device) for name, part in run.vector.items()}
        self.losses = [each.to(self.device) for each in self.losses]
        optimizer.param_groups = [
            {**group, "params": list(net.parameters()), "lr": run.lr}
            for net, run in zip(self.nets, self.runs, strict=True)
        ]

    def predict(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        """Test the range, and measure the sharpness, where all nets start."""
        low, high = self.runs[0].lr, self.runs[-1].lr
        self.range_test = range_test(self.nets[0], self.loss, self.batch, optimizer, low=low, high=high)
        start = self.sharpness(self.nets[0])
        limit = stability_limit(optimizer, start.value)
        loss = self.loss(self.nets[0](self.batch[0]), self.batch[1])
        gradient = torch.autograd.grad(loss, list(self.nets[0].parameters()))
        slope = float(nn.utils.get_total_norm(gradient) ** 2 / loss.detach())
        if momentum := group.get("momentum", 0.0):  # steps add up
            slope *= (1 - group["dampening"]) / (1 - momentum)
        for run in self.runs:
            run.limit, run.slope, run.sharpness, run.vector = limit, slope, [start.value], start.vector

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.range_test is not None
        checkpoint["sweep"] = {
            "runs": [asdict(run) for run in self.runs],
            "losses": self.losses,
            "range_test": asdict(self.range_test),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = checkpoint["sweep"]
        self.runs = [Run(**each) for each in found["runs"]]
        self.losses, self.range_test = found["losses"], RangeTest(**found["range_test"])

    def sharpness(self, net: nn.Module, start: dict[str, Tensor] | None = None) -> Curvature:
        f = training_loss(net, self.loss, self.batch)
        return curvature(f, f.parameters, start=start, tolerance=0.01, max_products=30)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = torch.stack([self.loss(net(batch[0]), batch[1]) for net in self.nets])
        if len(self.losses) > self.global_step:  # a closure's second look, after its step
            return losses.sum()
        self.losses.append(losses.detach())
        if len(self.losses) % self.sharpness_every == 0:
            for net, run in zip(self.nets, self.runs, strict=True):
                found = self.sharpness(net, run.vector)
                run.sharpness.append(found.value)
                run.vector = found.vector if math.isfinite(found.value) else None
        self.log("loss/train", losses.detach().nan_to_num(math.inf).min(), prog_bar=True)  # the best net's
        return losses.sum()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        losses = torch.stack([self.loss(net(batch[0]), batch[1]) for net in self.nets])
        self.log("loss/val", losses.nan_to_num(math.inf).min())

    def on_train_end(self) -> None:
        assert self.range_test is not None
        for run, curve in zip(self.runs, torch.stack(self.losses, 1).cpu(), strict=True):
            run.losses = curve.tolist()
        if isinstance(self.logger, TensorBoardLogger):
            folder = self.logger.log_dir
            write_curves(folder, self.runs, self.sharpness_every)
            figures = {**sweep_figures(self.runs, self.range_test), "range_test": self.range_test.figure()}
            for name, figure in figures.items():
                figure.savefig(f"{folder}/{name}.png")
                self.logger.experiment.add_figure(f"figures/{name}", figure, self.global_step)
            self.logger.experiment.add_text("sweep/table", sweep_markdown(self.runs), self.global_step)

    def report(self) -> str:
        """The sweep's table, and what the range test had suggested."""
        assert self.range_test is not None
        return f"{sweep_table(self.runs)}\n\n{self.range_test}"


def main(args: list[str]) -> None:
    RecipeCLI("learning_rate", Sweep, WholeDigits, args)
