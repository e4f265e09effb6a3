"""Handwritten digits by cross-entropy: 1,797 images of 8 x 8 pixels that ship inside scikit-learn.

``make train`` runs this with the settings of ``configs/digits.yaml``. ``--data.folder=DIR`` learns from the four files of
MNIST or Fashion-MNIST in DIR instead; with their 60,000 images a few epochs do, in larger batches:
``--trainer.max_epochs=3 --lr_scheduler.gamma=0.3 --data.batch_size=256``.
"""

from functools import partial
from os import PathLike

import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.cli import RecipeCLI
from recipes.idx import read_mnist
from torchcalc import nn as calc


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

    def __init__(self, net: nn.Module, loss: nn.Module):
        super().__init__()
        self.net, self.loss = net, loss

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
        )
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.step(batch, "test")


class Digits(LightningDataModule):
    """``load_digits`` split into 60 % train, 20 % validation and 20 % test, the classes in equal parts everywhere.

    Args:
        batch_size: images a training step sees.
        split_seed: decides which image is in which split; apart from the run's seed, so that runs are comparable.
        folder: learn from ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same of ``t10k`` in this
            folder instead, or .gz: MNIST's names. Their test set is theirs, validation a sixth of their training set.
    """

    def __init__(
        self, batch_size: PositiveInt = 64, split_seed: NonNegativeInt = 0, folder: str | PathLike[str] | None = None
    ):
        super().__init__()
        self.batch_size = batch_size
        split = partial(train_test_split, random_state=split_seed)
        if folder is None:
            images, labels = load_digits(return_X_y=True)
            x = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)  # pixels count 0 to 16 dots of ink
            y = torch.from_numpy(labels)
            index, test = split(torch.arange(len(y)), test_size=0.2, stratify=y)
            train, val = split(index, test_size=0.25, stratify=y[index])
            self.test = TensorDataset(x[test], y[test])
        else:
            sets = read_mnist(folder)
            (x, y), test = ((images.unsqueeze(1).float().div_(255), labels) for images, labels in sets.values())
            train, val = split(torch.arange(len(y)), test_size=1 / 6, stratify=y)
            self.test = TensorDataset(*test)
        self.train, self.val = (TensorDataset(x[i], y[i]) for i in (train, val))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 1024)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 1024)


def main(args: list[str]) -> None:
    RecipeCLI("digits", Classifier, Digits, args)
