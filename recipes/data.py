"""The recipes' data: they ship inside scikit-learn, or lie in a folder that the user names."""

import math
from functools import partial
from os import PathLike

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from recipes.idx import read_mnist
from torchcalc.resume import Loader


class Digits(LightningDataModule):
    """``load_digits`` split into 60 % train, 20 % validation and 20 % test, the classes in equal parts everywhere.

    Args:
        batch_size: images a training step sees, on all processes together.
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

    def train_dataloader(self) -> Loader | DataLoader:
        return Loader(self.train, self.batch_size, seed=torch.initial_seed())  # seed_everything's

    def val_dataloader(self) -> Loader:
        return Loader(self.val, 1024, shuffle=False)  # on several processes, no image counts twice

    def test_dataloader(self) -> Loader:
        return Loader(self.test, 1024, shuffle=False)


class WholeDigits(Digits):
    """The digits with the whole training set as every batch: then an epoch of ``steps`` is gradient descent, without noise.

    Args:
        steps: steps per epoch.
        split_seed: decides which image is in which split.
    """

    def __init__(self, steps: PositiveInt = 300, split_seed: NonNegativeInt = 0):
        super().__init__(split_seed=split_seed)
        self.steps = steps

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.train.tensors] * self.steps, batch_size=None)  # type: ignore[arg-type]


class Diabetes(LightningDataModule):
    """``load_diabetes`` in units of one standard deviation, split into 70 % train, 15 % validation and 15 % test.

    Args:
        steps: steps per epoch; each sees the whole training set.
        split_seed: decides who is in which split; apart from the run's seed, so that runs are comparable.
    """

    def __init__(self, steps: PositiveInt = 100, split_seed: NonNegativeInt = 0):
        super().__init__()
        self.steps = steps
        x, y = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True))
        x = x * math.sqrt(len(x))  # it ships with mean 0 and norm 1 per column
        y = (y - y.mean()) / y.std(correction=0)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split_seed))
        parts = order.tensor_split([int(0.7 * len(x)), int(0.85 * len(x))])
        self.train, self.val, self.test = (TensorDataset(x[i], y[i, None]) for i in parts)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.train.tensors] * self.steps, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, len(self.val))

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, len(self.test))

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        """They are float64, for the closed form; the model learns in its own dtype."""
        return [tensor.to(self.trainer.lightning_module.dtype) for tensor in batch]  # type: ignore[union-attr]
