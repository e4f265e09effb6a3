"""Gradient descent seen: six methods walk down four surfaces, and on a bowl the learning rate goes from crawling to diverging.

``python -m recipes descent`` leaves curves of log10(f(x) − f*), figures and animations in TensorBoard, and the pictures as
files in the run's folder.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from recipes.cli import RecipeCLI
from recipes.descent_figures import Walk, draw_paths, sweep_figure, sweep_table
from recipes.errors import did_you_mean
from torchcalc.calculus import curvature
from torchcalc.convergence import SURFACES, Surface, stability_limit
from torchcalc.instruments import layout
from torchcalc.optim import SGD, Adam, GradientDescent, Optimizer, RMSprop

METHODS: dict[str, Callable[..., Optimizer]] = {
    "GD": GradientDescent,
    "momentum": partial(SGD, momentum=0.9),
    "Nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "RMSprop": RMSprop,
    "Adam": Adam,
    "backtracking": partial(GradientDescent, backtrack=True),
}
SWEPT = ("GD", "momentum", "Nesterov")  # linear in x on a quadratic: their largest stable lr is known exactly


class Descent(LightningModule):
    """Each method on each surface from the same start, and a sweep of learning rates on the quadratic bowl.

    Args:
        lr: learning rate by surface and method; of ``backtracking`` the largest that is tried.
        sweep: learning rates of the sweep, as parts of the largest stable one; at least one.
        steps: steps of each descent, at least 30: fewer do not tell a walk that converges from one that does not.
        frames: pictures in an animation, at most; they take most of the time.
    """

    def __init__(
        self,
        lr: dict[str, dict[str, PositiveFloat]],
        sweep: list[PositiveFloat],
        steps: PositiveInt = 300,
        frames: PositiveInt = 60,
    ):
        super().__init__()
        if not sweep or steps < 30:
            raise ValueError(
                f"sweep: {sweep}, steps: {steps}; give at least one part of the limit, and at least 30 steps"
            )
        self.automatic_optimization = False
        self.steps, self.frames = steps, frames
        for name, known in [(name, SURFACES) for name in lr] + [
            (name, METHODS) for names in lr.values() for name in names
        ]:
            if name not in known:
                raise ValueError(f"lr: there is no {name!r}{did_you_mean(name, known)}; known are: {', '.join(known)}")
        # A checkpoint holds plain numbers.
        self.walks = [Walk(surface, method, float(lr[surface][method])) for surface in lr for method in lr[surface]]
        bowl = SURFACES["bowl"]
        sharpness = curvature(bowl, torch.tensor(bowl.start).double()).value
        for method in SWEPT:
            limit = stability_limit(METHODS[method]([nn.Parameter(torch.zeros(2))], lr=1.0), sharpness)
            self.walks += [Walk("bowl", method, part * limit, limit) for part in sweep]
        self.x = nn.ParameterList(torch.tensor(SURFACES[walk.surface].start).double() for walk in self.walks)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.steps))  # type: ignore[arg-type]  # a batch is no more than its number

    def configure_optimizers(self) -> list[Optimizer]:
        return [METHODS[walk.method]([x], lr=walk.lr) for walk, x in zip(self.walks, self.x, strict=True)]

    def training_step(self, batch: Tensor) -> None:
        for walk, x, optimizer in zip(self.walks, self.x, self.optimizers(), strict=True):

            def closure(surface: Surface = SURFACES[walk.surface], x: Tensor = x, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = surface(x)
                self.manual_backward(loss)
                return loss

            walk.path.append(x.detach().cpu().clone())
            optimizer.step(closure)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["paths"] = [
            torch.stack([*walk.path, x.detach().cpu()]) for walk, x in zip(self.walks, self.x, strict=True)
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for walk, path in zip(self.walks, checkpoint["paths"], strict=True):
            walk.path = list(path[:-1])  # the next step adds where it begins

    def on_train_end(self) -> None:
        """Write the curves, one run per method so that a chart shows them all, and the pictures."""
        for walk, x in zip(self.walks, self.x, strict=True):
            walk.path.append(x.detach().cpu())
        self.sweep = [walk for walk in self.walks if walk.limit]
        if not isinstance(self.logger, TensorBoardLogger):
            return
        folder, tensorboard = Path(self.logger.log_dir), self.logger.experiment
        descents = [walk for walk in self.walks if not walk.limit]
        for method in METHODS:
            with SummaryWriter(str(folder / method), purge_step=0) as writer:  # a resumed run has written them before
                for walk in (walk for walk in descents if walk.method == method):
                    for step, gap in enumerate(walk.gaps.clamp(min=1e-16).log10().tolist()):
                        writer.add_scalar(f"gap_log10/{walk.surface}", gap, step)
        surfaces = list(dict.fromkeys(walk.surface for walk in descents))
        tensorboard.add_custom_scalars(layout(f"gap_log10/{name}" for name in surfaces))
        for name in surfaces:
            draw_paths(name, [walk for walk in descents if walk.surface == name], folder, tensorboard, self.frames)
        figure = sweep_figure(self.sweep)
        figure.savefig(folder / "sweep.png")
        tensorboard.add_figure("learning_rate/sweep", figure)
        tensorboard.add_text("learning_rate/sweep", sweep_table(self.sweep))

    def report(self) -> str:
        """The sweep's table, for the terminal."""
        return sweep_table(self.sweep)


def main(args: list[str]) -> None:
    RecipeCLI("descent", Descent, None, args)
