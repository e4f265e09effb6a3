"""Linear regression of the progress of diabetes on ten measurements: 442 patients that ship inside scikit-learn.

The squared error of a linear model is a quadratic, so everything can be known beforehand: its optimum, by least squares;
its largest curvature λ, and with it the largest stable learning rate. Gradient descent at a part of that rate must arrive
at that optimum, and ``gap`` shows that it does. ``--model.loss=torchcalc.nn.HuberLoss`` trusts outliers less.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import OpenUnitInterval
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from recipes.cli import RecipeCLI
from recipes.data import Diabetes
from recipes.errors import fail
from recipes.regression_figure import regression_figure
from torchcalc import nn as calc
from torchcalc.calculus import derivative
from torchcalc.convergence import stability_limit
from torchcalc.optim import SGD, GradientDescent


class LinearRegression(LightningModule):
    """A linear model; logs its loss beside that of the least-squares solution, the gap between them, the gradient.

    Args:
        loss: loss(prediction, target), curved where they agree, as MSELoss and HuberLoss are.
        step: the learning rate as a part of the largest stable one; None keeps the optimizer's own ``lr``.
    """

    def __init__(self, loss: nn.Module, step: OpenUnitInterval | None = None):
        super().__init__()
        self.net, self.loss, self.step = calc.Linear(10, 1), loss, step

    @property
    def data(self) -> Diabetes:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_fit_start(self) -> None:
        """Solve the problem in closed form, and choose the learning rate."""
        x, y = self.data.train.tensors
        a = torch.cat([x, torch.ones_like(y)], 1)  # the last column is the intercept's
        self.solution = torch.linalg.lstsq(a, y).solution
        self.least = self.loss(a @ self.solution, y).item()
        (optimizer,) = self.trainer.optimizers
        if self.step is not None:
            # The mean of ℓ(a·w − y) has the Hessian ℓ''·aᵀa/n where ℓ is a parabola, and nowhere a larger one.
            bend = derivative(derivative(lambda d: self.loss(d, torch.zeros_like(d))))(x.new_zeros(()))
            sharpness = float(bend * torch.linalg.eigvalsh(a.T @ a / len(a))[-1])
            if not isinstance(optimizer, SGD | GradientDescent | torch.optim.SGD) or sharpness == 0:
                fail(
                    "model.step needs SGD or GradientDescent and a loss curved at 0, not "
                    f"{type(optimizer).__name__} and {type(self.loss).__name__}: set model.step=null, optimizer.lr"
                )
            for group in optimizer.param_groups:
                group["lr"] = self.step * stability_limit(optimizer, sharpness)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = self.loss(self.net(batch[0]), batch[1]).item()
        gradient = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict({"loss/train": loss, "loss/least_squares": self.least, "lr": lr})
        self.log("convergence/gradient_log10", gradient.log10())
        if (gap := loss / self.least - 1) > 0:  # HuberLoss goes below: least squares is not its optimum
            self.log("convergence/gap_log10", math.log10(gap))

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("loss/val", self.loss(self.net(batch[0]), batch[1]), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("loss/test", self.loss(self.net(batch[0]), batch[1]))

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Draw the coefficients beside the closed form's, and the test set's predictions beside the truth."""
        net = copy.deepcopy(self.net).double().cpu()
        train, test = self.data.train.tensors, self.data.test.tensors
        self.learned = torch.cat([net.weight[0], net.bias])
        self.gap = self.loss(net(train[0]), train[1]).item() / self.least - 1
        if isinstance(self.logger, TensorBoardLogger):
            figure = regression_figure(self.learned, self.solution[:, 0], test[1], net(test[0]))
            figure.savefig(Path(self.logger.log_dir) / "regression.png")
            self.logger.experiment.add_figure("figures/regression", figure, self.global_step)

    def report(self) -> str:
        """How far training stayed from the closed form."""
        return f"loss beyond that of least squares: {self.gap:.1e} of it"


def main(args: list[str]) -> None:
    RecipeCLI("regression", LinearRegression, Diabetes, args)
