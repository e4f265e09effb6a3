"""A small regression in Lightning, and what a run left in its event files."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

# Lightning 2.6 and torch 2.13 between them; none is ours.
LIGHTNINGS_OWN = [
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:.*in your `.*_dataloader`, it's strongly recommended",
    "ignore:Checkpoint directory .* exists and is not empty",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            for each in LIGHTNINGS_OWN:
                item.add_marker(pytest.mark.filterwarnings(each))


@pytest.fixture(autouse=True)
def single(one_thread: None) -> None:
    """Several threads only slow small tensors down."""


class Regression(LightningModule):
    """y = 2·Σx by a net; logs its loss."""

    def __init__(self, net: nn.Module | None = None, optimizer: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.make = optimizer or partial(torch.optim.SGD, lr=0.05)

    def step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log(f"loss/{stage}", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.step(batch, "val")

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def batches() -> list[tuple[Tensor, Tensor]]:
    """Four batches of eight, always in the same order."""
    x = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0))
    return [(each, 2 * each.sum(1, keepdim=True)) for each in x]


def loader(data: list[Any] | None = None) -> Any:
    return torch.utils.data.DataLoader(batches() if data is None else data, batch_size=None)


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    settings: dict[str, Any] = dict(
        accelerator="cpu",
        max_epochs=2,
        log_every_n_steps=1,
        logger=TensorBoardLogger(folder, name="", version="run", default_hp_metric=False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return Trainer(callbacks=list(callbacks), **(settings | options))


def fit(folder: Path, module: LightningModule, *callbacks: Any, val: bool = False, **options: Any) -> Trainer:
    trainer = trainer_of(folder, *callbacks, **options)
    trainer.fit(module, loader(), loader() if val else None)
    return trainer


def read(folder: Path) -> SimpleNamespace:
    """What TensorBoard finds: scalars (step, value) and images (step, pixels) by tag, and the names of tensors."""
    events = EventAccumulator(str(folder / "run"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()

    def picture(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image

    return SimpleNamespace(
        scalars={tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]},
        images={tag: [(e.step, picture(e.encoded_image_string)) for e in events.Images(tag)] for tag in tags["images"]},
        tensors={tag: [e.tensor_proto.string_val[0] for e in events.Tensors(tag)] for tag in tags["tensors"]},
    )


def group(found: SimpleNamespace, name: str) -> dict[str, list[tuple[int, float]]]:
    """The scalars of one group, by what comes after the slash."""
    return {tag.removeprefix(f"{name}/"): v for tag, v in found.scalars.items() if tag.startswith(f"{name}/")}
