"""Lightning trainings that test_processes.py runs in several processes."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from tests.resume.processes import IGNORED, Language, optimizer_of, sentences
from tests.same import same
from torchcalc.distributed import normalizer
from torchcalc.instruments import ExactResume
from torchcalc.resume import Loader


class Killed(BaseException):
    pass


class Lit(LightningModule):
    """The same with Lightning, with dropout's randomness, sharded where the strategy has a mesh."""

    def __init__(self, die_at: int = -1) -> None:
        super().__init__()
        self.net, self.die_at, self.drawn = Language(), die_at, 0.0

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net.head.weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.hidden, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == self.die_at:
            raise Killed
        noise = 1 + 0.1 * torch.rand(()) * np.random.rand() * random.random()
        loss = self.net(*batch, normalizer((batch[1] != IGNORED).sum())) * noise
        self.log("loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self) -> Any:
        return optimizer_of(self)


LOADERS = {"ours": lambda: Loader(sentences(), 8, seed=1), "torch's": lambda: DataLoader(sentences(), 4, shuffle=True)}


def fit(
    folder: Path, strategy: Any, loader: str, die_at: int = -1, ckpt_path: str | None = None, saves: bool = True
) -> dict[str, Any]:
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed((3 if ckpt_path is None else 4) + dist.get_rank())
    module = Lit(die_at)
    trainer = Trainer(
        accelerator="cpu", devices=dist.get_world_size(), strategy=strategy(), max_epochs=3, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=saves,
        callbacks=[ExactResume(folder, every_n_steps=2, every_seconds=None)] * saves,
    )  # fmt: skip
    trainer.fit(module, LOADERS[loader](), ckpt_path=ckpt_path)
    weights = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in module.state_dict().items()}
    return dict(weights=weights, random=torch.rand(3), loss=trainer.callback_metrics["loss_epoch"])


def exact_resume(folder: Path) -> None:
    """Killed in the middle of the second epoch, resumed, under DDP and FSDP2: bit for bit, on each process."""
    kinds = {"ddp": lambda: "ddp", "fsdp2": lambda: ModelParallelStrategy(dist.get_world_size(), 1)}
    for kind, loader in [("ddp", "ours"), ("ddp", "torch's"), ("fsdp2", "ours")]:
        whole, killed = (folder / f"{kind} {loader}" / name for name in ("whole", "killed"))
        expected = fit(whole, kinds[kind], loader)
        alone = fit(whole, kinds[kind], loader, saves=False)
        same(alone, expected, f"{kind}, without a checkpoint")
        with contextlib.suppress(Killed):
            fit(killed, kinds[kind], loader, die_at=5)
        dist.barrier()
        same(fit(killed, kinds[kind], loader, ckpt_path="last"), expected, kind)
        if dist.get_rank() == 0:
            assert {path.name for path in killed.iterdir()} == {"last.ckpt"}
