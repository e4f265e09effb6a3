"""A training that is stopped anywhere goes on to the weights, curves and random states of one that is not."""

from __future__ import annotations

import io
import itertools
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from tests.instruments.conftest import read
from tests.same import same
from torchcalc import optim
from torchcalc.instruments import ExactResume
from torchcalc.resume import Loader

N, EPOCHS = 22, 3  # samples in batches of 4: an epoch has six, the last one smaller


class Killed(BaseException):
    """Nothing is saved on it: to the files it is a ``kill -9``."""


class Noisy(Dataset):
    """Samples that every generator adds noise to."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(3) + np.random.rand() + random.random()
        return i + noise, torch.tensor([i / N])


class Stream(IterableDataset):
    """The same without a length: Lightning loads a batch ahead."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(Noisy().__getitem__, torch.randperm(N).tolist())


LOADERS: dict[str, Callable[[], Any]] = {
    "ours": lambda: Loader(Noisy(), 4, seed=3),
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "own generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "weighted": lambda: DataLoader(Noisy(), 4, sampler=WeightedRandomSampler(torch.arange(1.0, N + 1), N)),
    "stream": lambda: DataLoader(Stream(), 4),
    "whole batches": lambda: DataLoader([(torch.eye(3) * i, torch.ones(3, 1)) for i in range(6)], batch_size=None),
    "two": lambda: CombinedLoader([LOADERS["ours"](), DataLoader(Noisy(), 9, shuffle=True)], "max_size_cycle"),
    "worker": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1),
    "our worker": lambda: Loader(Noisy(), 4, num_workers=1),
    "persistent": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1, persistent_workers=True),
    "our persistent": lambda: Loader(Noisy(), 4, num_workers=1, persistent_workers=True),
}


class Module(LightningModule):
    """Dropout, a batch norm, two schedules; dies where ``die(where, epoch, batch)`` says so."""

    def __init__(self, die: Callable[..., bool] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer("average", torch.zeros(1))
        self.die = die

    def at(self, where: str, batch_idx: int = -1) -> None:
        if self.die is not None and self.die(where, self.current_epoch, batch_idx):
            raise Killed

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.at("step", batch_idx)
        batch = batch[0] if len(batch[0]) == 2 and not isinstance(batch[0], Tensor) else batch  # of two loaders
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1]) * (1 + 0.1 * random.random() * np.random.rand())
        self.log("loss/train", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.average += self.net[0].weight.detach().mean()
        self.at("batch end", batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.at("validation")
        self.log("loss/val", nn.functional.mse_loss(self.net(batch[0]), batch[1]) + torch.rand(()))

    def on_train_epoch_end(self) -> None:
        self.at("epoch end")

    def configure_optimizers(self) -> Any:
        optimizer = optim.AdamW(self.parameters(), lr=1e-2, max_norm=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        step = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
        return [optimizer], [
            {"scheduler": plateau, "monitor": "loss/train_epoch", "name": "plateau"},
            {"scheduler": step, "interval": "step", "name": "step"},
        ]


def trainer_of(folder: Path, resume: ExactResume, **options: Any) -> Trainer:
    settings: dict[str, Any] = dict(
        accelerator="cpu",
        max_epochs=EPOCHS,
        log_every_n_steps=1,
        logger=TensorBoardLogger(folder, name="", default_hp_metric=False),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[resume],
    )
    return Trainer(**(settings | options))


def train(
    folder: Path, loader: str, module: Module, ckpt_path: str | None = None, every: int = 1, **options: Any
) -> Any:
    """Train from the same random state; return weights, optimizer, generators and curves at the end."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7 if ckpt_path is None else 8)
    trainer = trainer_of(folder, ExactResume(every_n_steps=every, every_seconds=None), **options)
    trainer.fit(module, LOADERS[loader](), DataLoader(Noisy(), 11), ckpt_path=ckpt_path)
    (folder / "run").exists() or (folder / "run").symlink_to("version_0")
    return dict(
        weights=module.state_dict(),
        optimizer=trainer.optimizers[0].state_dict(),
        schedulers=[each.scheduler.state_dict() for each in trainer.lr_scheduler_configs],
        random=[torch.rand(3), np.random.rand(3).tolist(), random.random()],
        curves=read(folder).scalars,
        steps=trainer.global_step,
    )


POINTS = {
    "the first step": ("step", 0, 0),
    "mid-epoch": ("step", 1, 3),
    "a batch's end": ("batch end", 1, 2),
    "the last batch's end": ("batch end", 1, 5),
    "validation": ("validation", 1, -1),
    "an epoch's end": ("epoch end", 1, -1),
    "an epoch's first step": ("step", 2, 0),
}


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names end with the process's count of them, and are read by name: the tenth before the ninth."""
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", _Count())


class _Count:
    at = 0

    def get(self) -> int:
        self.at += 1
        return self.at


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    found: dict[str, Any] = {}

    def of(loader: str, **options: Any) -> Any:
        key = f"{loader} {options}"
        if key not in found:
            found[key] = train(tmp_path_factory.mktemp("whole"), loader, Module(), **options)
        return found[key]

    return of


def resumed(folder: Path, loader: str, point: tuple[Any, ...], **options: Any) -> Any:
    with pytest.raises(Killed):
        train(folder, loader, Module(lambda *at: at == point), **options)
    return train(folder, loader, Module(), "last", **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulated": dict(accumulate_grad_batches=2),
    "limited": dict(limit_train_batches=5),
    "validated within the epoch": dict(val_check_interval=2),
    "validated every second epoch": dict(check_val_every_n_epoch=2),
    "by steps": dict(max_epochs=-1, max_steps=15),
}
SLOW = {"worker", "our worker", "persistent", "our persistent"}
CASES = [("ours", point, 1, "") for point in POINTS]
CASES += [(loader, "mid-epoch", 4, "") for loader in LOADERS]
CASES += [("shuffled", "an epoch's first step", 1, ""), ("stream", "an epoch's first step", 1, "")]
CASES += [("ours", "mid-epoch", 3, options) for options in OPTIONS]


@pytest.mark.filterwarnings("ignore:persistent_workers=True. the workers are started anew in every epoch")
@pytest.mark.parametrize(
    ("loader", "point", "every", "options"),
    [pytest.param(*case, marks=pytest.mark.slow if case[0] in SLOW else ()) for case in CASES],
)
def test_as_uninterrupted(loader, point, every, options, tmp_path, uninterrupted):
    whole = uninterrupted(loader, **OPTIONS.get(options, {}))
    found = resumed(tmp_path, loader, POINTS[point], every=every, **OPTIONS.get(options, {}))
    same(found, whole)
    assert [file.name for file in (tmp_path / "version_0/checkpoints").iterdir()] == ["last.ckpt"]


def test_lightning_alone_is_not_exact(tmp_path, uninterrupted):
    """What the tests above would find: without the callback's share the same resume ends elsewhere."""
    whole = uninterrupted("shuffled")
    with pytest.raises(Killed):
        train(tmp_path, "shuffled", Module(lambda *at: at == POINTS["mid-epoch"]))
    path = tmp_path / "version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(path)
    del checkpoint["exact_resume"], checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    torch.save(checkpoint, path)
    with pytest.raises(AssertionError, match="weights"):
        same(train(tmp_path, "shuffled", Module(), "last"), whole)


def test_more_epochs_after_the_end(tmp_path, uninterrupted):
    for loader in ("ours", "shuffled"):
        train(tmp_path / loader, loader, Module(), max_epochs=2)
        same(train(tmp_path / loader, loader, Module(), "last"), uninterrupted(loader))


def test_killed_again_and_again(tmp_path, uninterrupted):
    whole = uninterrupted("shuffled")
    ckpt_path = None
    for point in [(0, 1), (0, 4), (1, 0), (1, 5), (2, 3)]:
        with pytest.raises(Killed):
            train(tmp_path, "shuffled", Module(lambda *at, point=point: at == ("step", *point)), ckpt_path)
        ckpt_path = "last"
    same(train(tmp_path, "shuffled", Module(), ckpt_path), whole)


def test_killed_while_a_checkpoint_is_written(tmp_path, uninterrupted, monkeypatch):
    """Half of it is in a file that nothing picks up; the one before counts."""
    whole = uninterrupted("ours")
    save, times = torch.save, iter(range(100))

    def half(content: Any, file: Any) -> None:
        if next(times) < 9:
            save(content, file)
        else:
            whole_file = io.BytesIO()
            save(content, whole_file)
            file.write(whole_file.getvalue()[: len(whole_file.getvalue()) // 2])
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        patched.setattr(Path, "unlink", lambda *args, **kwargs: None)  # a process that is killed removes nothing
        with pytest.raises(Killed):
            train(tmp_path, "ours", Module())
    folder = tmp_path / "version_0/checkpoints"
    assert {file.name for file in folder.iterdir()} == {"last.ckpt", ".last.ckpt.tmp"}
    assert torch.load(folder / "last.ckpt")["global_step"] == 8
    same(train(tmp_path, "ours", Module(), "last"), whole)
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told the user, whatever others have done to Lightning's loggers."""
    messages: list[str] = []
    monkeypatch.setattr("torchcalc.instruments.exact_resume.rank_zero_info", messages.append)
    return messages


@pytest.mark.parametrize(("which", "ends"), [(signal.SIGINT, SystemExit), (signal.SIGTERM, SIGTERMException)])
def test_a_signal_saves_says_how_to_go_on_and_ends(which, ends, tmp_path, uninterrupted, said):
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(*at: Any) -> bool:
        if at == POINTS["mid-epoch"]:
            os.kill(os.getpid(), which)
        return False

    try:
        with pytest.raises(ends):
            train(tmp_path, "ours", Module(interrupt), every=1000)
    finally:
        for each, handler in handlers.items():  # Lightning ignores Ctrl-C from the first one on
            signal.signal(each, handler)
    path = tmp_path / "version_0/checkpoints/last.ckpt"
    assert torch.load(path)["global_step"] == 10  # the step is done
    assert f'Step 10 is saved in {path}. To go on: trainer.fit(..., ckpt_path="last")' in said
    same(train(tmp_path, "ours", Module(), "last"), uninterrupted("ours"))


def test_last_without_a_checkpoint(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"ckpt_path='last': there is no complete checkpoint .*last"):
        train(tmp_path, "ours", Module(), "last")
    assert not any(tmp_path.iterdir())
    folder = tmp_path / "version_0/checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(MisconfigurationException, match="no complete checkpoint"):
        train(tmp_path, "ours", Module(), "last")


def test_last_is_the_newest_run_and_goes_on_there(tmp_path):
    for _ in range(2):
        with pytest.raises(Killed):
            train(tmp_path, "ours", Module(lambda *at: at == POINTS["mid-epoch"]))
        (tmp_path / "run").unlink(missing_ok=True)
    train(tmp_path, "ours", Module(), "last")
    steps = {
        run: torch.load(tmp_path / run / "checkpoints/last.ckpt")["global_step"] for run in ("version_0", "version_1")
    }
    assert steps == {"version_0": 9, "version_1": 18}
    assert sorted(path.name for path in tmp_path.glob("version_*")) == ["version_0", "version_1"]


def test_the_clock(tmp_path, monkeypatch):
    """With a clock that goes a second a step: at the start, every third second, at the end."""
    saved: list[int] = []
    now = itertools.count()
    monkeypatch.setattr("torchcalc.instruments.exact_resume.time.monotonic", lambda: next(now))

    class Watched(ExactResume):
        def _save(self, trainer: Trainer, clean: str) -> None:
            super()._save(trainer, clean)
            saved.append(trainer.global_step)

    trainer_of(tmp_path, Watched(every_seconds=3), max_epochs=1).fit(Module(), LOADERS["ours"]())
    assert saved[0] == 0 and saved[-1] == 6
    assert 3 <= len(saved) <= 5, saved


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_loads_its_own_batch(tmp_path):
    class Own(Module):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(
        MisconfigurationException, match=r"training_step\(dataloader_iter\) loads batches in the middle"
    ):
        trainer_of(tmp_path, ExactResume()).fit(Own(), LOADERS["ours"]())


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """The disk is full from the fourth checkpoint on: the error is the disk's, not torch.save's."""
    save, times = torch.save, itertools.count()

    def full(content: Any, file: Any) -> None:
        if next(times) == 3:
            file.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(tmp_path, "ours", Module())
    folder = tmp_path / "version_0/checkpoints"
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt")["global_step"] == 2


class Data(LightningDataModule):
    def train_dataloader(self) -> Any:
        return LOADERS["shuffled"]()


def test_one_entry_in_anybodys_yaml(tmp_path, monkeypatch, said):
    """LightningCLI would not overwrite the run's config, and takes ``last`` from the run that it is about to begin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "trainer: {max_epochs: 2, accelerator: cpu, logger: true, enable_progress_bar: false, log_every_n_steps: 1, "
        "callbacks: [{class_path: torchcalc.instruments.ExactResume, init_args: {every_n_steps: 1, every_seconds: null}}]}\n"
        "seed_everything: 1"
    )

    def run(*more: str) -> Any:
        args = ["fit", "--config=mine.yaml", *more]
        monkeypatch.setattr(sys, "orig_argv", ["python", "mine.py", *args])
        monkeypatch.setattr(sys, "argv", ["mine.py", *args])
        return LightningCLI(Module, Data).model.state_dict()

    step = Module.training_step

    def killed(self: Module, batch: Any, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == (1, 3):
            raise Killed
        if (self.current_epoch, batch_idx) == (0, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(Module, "training_step", killed)
        with pytest.raises(SIGTERMException):
            run()
        how = "Step 4 is saved in .*version_0/checkpoints/last.ckpt. To go on: python mine.py fit --config=mine.yaml "
        assert any(re.search(rf"{how}--ckpt_path=last$", each) for each in said)
        with pytest.raises(Killed):
            run("--ckpt_path=last")
    found = run("--ckpt_path=last")
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"]
    same(found, run())
