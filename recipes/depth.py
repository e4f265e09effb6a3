"""The chain rule through 2 to 200 layers: a sigmoid net's gradient vanishes, a residual net keeps its own, and learns.

``recipes/deep_nets.py`` says why. ``python -m recipes depth`` trains nets of three kinds and five depths on handwritten
digits, and leaves a figure, curves of each kind and a heat map of the gradients in TensorBoard.
"""

import math
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from recipes.cli import RecipeCLI
from recipes.data import Digits
from recipes.deep_nets import VARIANCE, deep_net, gain, weight_gradients
from recipes.depth_figure import depth_figure
from recipes.errors import fail
from torchcalc.nn import CrossEntropyLoss


class Depth(LightningModule):
    """Nets of each kind and depth learn side by side, from the same batches.

    They share no parameter, so the gradient of the sum of their losses is for each net its own.

    Args:
        depths: linear layers of the nets, at least 2, ascending.
        width: units of each hidden layer.
    """

    def __init__(self, depths: list[PositiveInt], width: PositiveInt = 32):
        super().__init__()
        if min(depths, default=0) < 2:
            raise ValueError(f"depths: {depths}; give numbers of layers, of at least 2")
        self.depths, self.loss = depths, CrossEntropyLoss()
        sizes = [(kind, depth) for kind in VARIANCE for depth in depths]
        self.nets = nn.ModuleDict({f"{kind}_{depth}": deep_net(kind, depth, width) for kind, depth in sizes})
        self.gain = {kind: gain(kind) for kind in VARIANCE}
        self.gradients: dict[str, list[float]] = {}  # norm by layer at initialisation
        self.first: dict[str, Tensor] = {}  # norm at the first layer's weights, at the last step
        self.accuracy: dict[str, float] = {}
        self.writers: dict[str, SummaryWriter] = {}
        self.forget()

    def forget(self) -> None:
        self.right, self.count = torch.zeros(len(self.nets)), 0

    on_validation_epoch_start = on_test_epoch_start = forget

    def on_fit_start(self) -> None:
        if not self.gradients:  # a resumed run's come with its checkpoint
            x, y = self.trainer.datamodule.train[:256]  # type: ignore[attr-defined]
            if x[0].numel() != 64:
                fail(f"data.folder: its images have {x[0].numel()} pixels, and these nets take 8 x 8; leave it out")
            self.gradients = {name: weight_gradients(net, x, y) for name, net in self.nets.items()}

    on_test_start = on_fit_start  # of nets that were not trained

    def on_train_start(self) -> None:
        if isinstance(self.logger, TensorBoardLogger):  # a run for each kind: the curves of a depth share a chart
            folder, known = self.logger.log_dir, self.global_step + 1  # a resumed run draws no step twice
            self.writers = {kind: SummaryWriter(f"{folder}/{kind}", purge_step=known) for kind in VARIANCE}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gradients"] = self.gradients

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gradients = checkpoint["gradients"]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = torch.stack([self.loss(net(batch[0]), batch[1]) for net in self.nets.values()])
        self.log("loss/train", losses.mean(), on_step=False, on_epoch=True, prog_bar=True)
        return losses.sum()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        weights = {name: next(net.parameters()) for name, net in self.nets.items()}
        self.first = {name: weight.grad.norm() for name, weight in weights.items() if weight.grad is not None}

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        logits = self.evaluate(batch)
        losses = torch.stack([self.loss(each, batch[1]) for each in logits])
        self.log("loss/val", losses.mean(), prog_bar=True, batch_size=len(batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.evaluate(batch)

    def evaluate(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Count what each net gets right; its logits, (nets, N, 10)."""
        logits = torch.stack([net(batch[0]) for net in self.nets.values()])
        self.right += (logits.argmax(2) == batch[1]).sum(1).cpu()
        self.count += len(batch[1])
        return logits

    def on_validation_epoch_end(self) -> None:
        self.accuracy = dict(zip(self.nets, (self.right / self.count).tolist(), strict=True))
        for kind, writer in self.writers.items():
            for depth in self.depths:
                name = f"{kind}_{depth}"
                writer.add_scalar(f"accuracy/{depth} layers", self.accuracy[name], self.global_step)
                if name in self.first and (norm := self.norm_at_first_layer(name)):
                    writer.add_scalar(f"first_gradient_log10/{depth} layers", math.log10(norm), self.global_step)
            writer.flush()

    def norm_at_first_layer(self, name: str) -> float:
        """Of the gradient: in float64, as in the report, where its square is near the end of float32."""
        norm = self.first[name].item()
        if norm > 1e-15:
            return norm
        x, y = self.trainer.datamodule.train[:256]  # type: ignore[attr-defined]
        return weight_gradients(self.nets[name], x, y)[0]

    def on_test_epoch_end(self) -> None:
        self.accuracy = dict(zip(self.nets, (self.right / self.count).tolist(), strict=True))
        deepest = [f"{kind}_{max(self.depths)}" for kind in VARIANCE]
        self.log_dict({f"{name}/test": self.accuracy[name] for name in deepest})
        if isinstance(self.logger, TensorBoardLogger):
            figure = depth_figure(self.depths, self.gradients, self.accuracy, self.gain)
            figure.savefig(f"{self.logger.log_dir}/depth.png")
            self.logger.experiment.add_figure("figures/depth", figure, self.global_step)

    def report(self) -> str:
        """Test accuracy of each net, and the gradient at its first layer as a part of that at its last."""
        rows = [["net", *(f"{depth} layers" for depth in self.depths)]]
        for kind in VARIANCE:
            names = [f"{kind}_{depth}" for depth in self.depths]
            parts = [self.gradients[name][0] / self.gradients[name][-1] for name in names]
            rows.append([f"{kind}: test accuracy", *(f"{self.accuracy[name]:.3f}" for name in names)])
            rows.append([f"{kind}: first / last gradient", *(f"{part:.0e}" for part in parts)])
        return "\n".join(f"{name:<31}" + "".join(f"{cell:>11}" for cell in cells) for name, *cells in rows)


def main(args: list[str]) -> None:
    torch.set_num_threads(1)  # layers this narrow only lose time to a second thread
    RecipeCLI("depth", Depth, Digits, args)
