"""What an exact resume has to know about the inside of Lightning 2.6: its loaders, loops, results and event files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer

from torchcalc.resume.files import save
from torchcalc.resume.loader import Replay

__all__ = [
    "AtomicCheckpointIO",
    "Watched",
    "add_results",
    "forget_from",
    "in_pieces",
    "load_loaders",
    "nothing_is_half_done",
    "other_dtypes",
    "results",
]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's, whose checkpoints are there as a whole or not at all, also where the temporary folder is another disk.

    :class:`ExactResume` uses it; alone it is one of the trainer's ``plugins``.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; see :func:`torchcalc.resume.save`."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save(checkpoint, path)


class Watched:
    """A loader that calls ``between`` before it loads a batch, and whose state is that of the batches trained on."""

    def __init__(self, loader: Any, between: Callable[[], None]) -> None:
        stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        ahead = sized_len(loader) is None  # then Lightning loads a batch ahead
        self.loader, self.between = loader if stateful else Replay(loader, ahead), between
        self.keep = stateful and ahead
        self.before: Any = None  # the state before the batch that was loaded ahead

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self.iterate(iter(self.loader))

    def iterate(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.between()
            if self.keep:
                self.before = self.loader.state_dict()
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def state_dict(self) -> Any:
        return self.before if self.before is not None else self.loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)


def in_pieces(trainer: Trainer) -> bool:
    """Tell whether the strategy saves a folder, in which every process has its file."""
    strategy = trainer.strategy
    distributed = getattr(strategy, "_save_distributed_checkpoint", False)
    return bool(distributed or getattr(strategy, "_state_dict_type", "") == "sharded")


def load_loaders(trainer: Trainer) -> None:
    """Give the train loaders their states where they were made before the checkpoint was read.

    Lightning makes them when a module asks for ``trainer.estimated_stepping_batches``, and forgets the states then.
    """
    fit_loop = trainer.fit_loop
    states = fit_loop._combined_loader_states_to_load
    if states and fit_loop.restarting:  # not between epochs
        assert fit_loop._combined_loader is not None and fit_loop._data_fetcher is not None
        fit_loop._combined_loader._load_state_dicts(states)
        fit_loop._combined_loader_states_to_load = []
        iter(fit_loop._data_fetcher)  # makes iterators that begin there


def other_dtypes(saved: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Tell whether loading one state dict into the other rounds; an extra state need not be a tensor."""
    return any(
        getattr(value, "dtype", None) != getattr(here.get(name, value), "dtype", None) for name, value in saved.items()
    )


def nothing_is_half_done(trainer: Trainer) -> None:
    """Keep Lightning from guessing what was; with max_steps its setter of ``restarting`` would refuse."""
    fit_loop = trainer.fit_loop
    for loop in (fit_loop, fit_loop.epoch_loop, fit_loop.epoch_loop.val_loop):
        loop._restarting = False


def results(trainer: Trainer) -> dict[str, Any]:
    """What has been added up for the epoch's means, without what torchmetrics keep themselves."""
    found = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        if metric.is_tensor and metric.meta.on_epoch and not metric.has_reset:
            found[key] = {"value": metric.value.detach().cpu()}
            if metric.meta.is_mean_reduction:
                found[key]["batch_size"] = metric.cumulated_batch_size.detach().cpu()
    return found


def add_results(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Add what :func:`results` returned to what has been logged since; what is not logged yet stays in ``saved``."""
    for key, metric in trainer.fit_loop.epoch_loop._results.items() if saved else ():
        if old := saved.pop(key, None):
            both = old["value"].to(metric.value), metric.value
            extreme = metric.meta.is_max_reduction or metric.meta.is_min_reduction
            metric.value = metric.meta.reduce_fx(torch.stack(both)) if extreme else both[0] + both[1]
            if "batch_size" in old:
                metric.cumulated_batch_size = old["batch_size"].to(metric.value.device) + metric.cumulated_batch_size


def forget_from(writer: Any, step: int) -> None:
    """Tell TensorBoard that curves go on from here: ``purge_step`` of a SummaryWriter that exists already."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer._get_file_writer()
    for event in (
        Event(step=step, file_version="brain.Event:2"),
        Event(step=step, session_log=SessionLog(status=SessionLog.START)),
    ):
        writer.file_writer.add_event(event, step)
