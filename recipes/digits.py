"""Handwritten digits by cross-entropy: 1,797 images of 8 x 8 pixels that ship inside scikit-learn.

``make train`` runs this with the settings of ``configs/digits.yaml``. ``--data.folder=DIR`` learns from the four files of
MNIST or Fashion-MNIST in DIR instead; with their 60,000 images a few epochs do, in larger batches:
``--trainer.max_epochs=3 --lr_scheduler.gamma=0.3 --data.batch_size=256``.
"""

import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from recipes.cli import RecipeCLI
from recipes.data import Digits
from torchcalc import nn as calc
from torchcalc.distributed import normalizer


class ConvNet(nn.Module):
    """Two convolutions, a pool and two linear layers, (N, 1, H, W) -> (N, 10); 150,000 parameters at width 32."""

    def __init__(self, width: PositiveInt = 32):
        super().__init__()
        self.strokes = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), calc.GELU())
        self.digits = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1),
            calc.GELU(),
            nn.AdaptiveMaxPool2d(4),  # by 2 from 8 x 8
            nn.Flatten(),
            calc.Linear(32 * width, 128),
            calc.GELU(),
            calc.Linear(128, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        strokes = self.strokes(x)
        return self.digits(F.max_pool2d(strokes, 2) if min(x.shape[2:]) >= 16 else strokes)


class Classifier(LightningModule):
    """Any net with any loss; logs loss and accuracy of the training, validation and test sets."""

    many = True  # processes may share a batch

    def __init__(self, net: nn.Module, loss: nn.Module):
        super().__init__()
        self.net, self.loss = net, loss
        self.share = 1.0  # what this process's mean counts in the mean over all processes' images

    def step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = self.loss(logits, y)
        accuracy = (logits.argmax(1) == y).float().mean()
        # "loss/train" and "loss/val" share a group, so that TensorBoard draws them side by side.
        self.log_dict(
            {f"loss/{stage}": loss, f"accuracy/{stage}": accuracy},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(y),
            sync_dist=True,
        )
        return loss

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.trainer.world_size > 1:  # here, since instruments call training_step on one process alone
            n = len(batch[1])
            self.share = float(n / normalizer(n, device=self.device))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.share * self.step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.step(batch, "test")


def main(args: list[str]) -> None:
    RecipeCLI("digits", Classifier, Digits, args)
