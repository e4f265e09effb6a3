"""A training that is killed goes on to the weights that it would have had: bit for bit on a CPU.

Lightning calls many hooks for a batch, and state changes between any two of them. Only one moment has nothing half done: when
the next batch is asked for. Then validation, schedulers, logs and the hooks of the last batch are over. So the train loader is
wrapped: what it is asked for a batch is the moment to save, and after a resume the first such moment is the one to go on from.
"""

from __future__ import annotations

import math
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed as dist

from torchcalc.distributed import all_reduce_
from torchcalc.instruments.instrument import callbacks_of, check_at_least_one, steps_of
from torchcalc.instruments.loops import (
    AtomicCheckpointIO,
    Watched,
    add_results,
    forget_from,
    in_pieces,
    load_loaders,
    nothing_is_half_done,
    other_dtypes,
    results,
)
from torchcalc.resume.files import newest, publish, temporary
from torchcalc.resume.randomness import rng_state, set_rng_state

__all__ = ["ExactResume"]

KEY = "exact_resume"  # of what the callback adds to a checkpoint
NAME = "last.ckpt"


class ExactResume(ModelCheckpoint):
    """Keep ``checkpoints/last.ckpt`` in the run's folder, from which ``ckpt_path="last"`` goes on exactly.

    After ``kill -9`` at any moment the same command with ``ckpt_path="last"`` reaches the weights of an uninterrupted run, on a
    CPU bit for bit: it continues in the middle of an epoch with the next batch; optimizer, schedulers, the generators of torch,
    CUDA, NumPy and Python, what was logged for the epoch's mean and what callbacks keep are as they were. ``last`` is the newest
    run's, and goes on in its folder; if no run has a checkpoint, that is an error. TensorBoard shows no step twice. Ctrl-C and
    SIGTERM finish the step, save, say how to go on and end; a second Ctrl-C ends at once.

    A loader that is a :class:`torchcalc.resume.Loader` or has ``state_dict`` itself jumps to its position; any other loads the
    epoch's batches once more up to there. Saving waits for the end of an accumulation of gradients.

    Args:
        dirpath: the folder of ``last.ckpt``; None: ``checkpoints`` in the folder of the trainer's first logger.
        every_n_steps: save at every n-th optimizer step, ≥ 1; None: the clock alone decides.
        every_seconds: save when so much time has gone by, ≥ 0; None: every_n_steps alone decides. The start and the end of
            the training are saved in any case; with FSDP2, which saves pieces, the first step in place of the start.
        quiet: do not say how to go on, because the caller does.

    Raises:
        ValueError: a number is out of its range.
        MisconfigurationException: ``last`` without a checkpoint; a ``training_step`` that takes a dataloader_iter.

    >>> ExactResume(every_n_steps=0)
    Traceback (most recent call last):
    ValueError: every_n_steps=0: must be at least 1, or None
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        every_n_steps: int | None = None,
        every_seconds: float | None = 60.0,
        quiet: bool = False,
    ) -> None:
        super().__init__(dirpath=dirpath, filename="last", save_top_k=0)
        check_at_least_one("every_n_steps", every_n_steps, or_none=True)
        if every_seconds is not None and not every_seconds >= 0:
            raise ValueError(f"every_seconds={every_seconds}: must not be negative, or None")
        self.every_n_steps, self.every_seconds, self.quiet = every_n_steps, every_seconds, quiet
        self._trainer: Trainer | None = None
        self._clean = ""  # what the checkpoint that is being written is: "batch" or "end"; "": somebody else's
        self._loaded: dict[str, Any] | None = None  # what a checkpoint said, until training goes on from it
        self._rounded: dict[str, Any] | None = None  # weights that were loaded into a narrower dtype than they have
        self._results: dict[str, Any] = {}  # of the epoch so far, until they are logged again
        self._at = (-1, -1)  # epoch and batch of the last moment between batches
        self._saved, self._saved_at = -1, -math.inf  # step and time
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._process: Callable[[Any], Any] | None = None

    # Which checkpoint, and where the run goes on.

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Lightning asks for it where ``ckpt_path="last"``."""
        logger = trainer.loggers[0] if trainer.loggers else None
        fixed = getattr(logger, "_version", None)  # None: the logger will take the next free number
        if self.dirpath:
            folder, pattern = Path(self.dirpath), "last*.ckpt"
        elif logger is None:
            folder, pattern = Path(trainer.default_root_dir) / "checkpoints", "last*.ckpt"
        else:
            folder = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)
            run = "*" if fixed is None else fixed if isinstance(fixed, str) else f"version_{fixed}"
            pattern = f"{run}/checkpoints/last*.ckpt"
        path = newest(folder, pattern)
        if path is None:
            raise MisconfigurationException(
                f"ckpt_path='last': there is no complete checkpoint {str(folder / pattern)!r}; leave ckpt_path out to begin"
            )
        if logger is not None and fixed is None and not self.dirpath:
            number = re.fullmatch(r"version_(0|[1-9]\d*)", path.parent.parent.name)
            logger._version = int(number[1]) if number else path.parent.parent.name  # type: ignore[attr-defined]
        for callback in callbacks_of(trainer):
            if isinstance(callback, SaveConfigCallback):
                callback.overwrite = True  # with the same
        return {str(path)}

    @property
    def path(self) -> Path:
        """The checkpoint that ``last`` means."""
        return Path(self.dirpath or "checkpoints") / NAME

    # The moment between two batches.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the train loader when the trainer gets it."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._trainer, self._at, self._saved, self._signal = trainer, (-1, -1), -1, None
        strategy = trainer.strategy
        if type(getattr(strategy, "checkpoint_io", None)) is TorchCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO()
        process = self._process = strategy.process_dataloader

        def wrapped(loader: Any) -> Any:
            return Watched(process(loader), self._between) if trainer.training else process(loader)

        strategy.process_dataloader = wrapped  # type: ignore[method-assign,assignment]

    def _between(self) -> None:
        """Go on from a checkpoint, or save, or stop; called before a batch is loaded."""
        trainer = self._trainer
        assert trainer is not None
        fetcher, loop = trainer.fit_loop._data_fetcher, trainer.fit_loop.epoch_loop
        if isinstance(fetcher, _DataLoaderIterDataFetcher):
            raise MisconfigurationException(
                "ExactResume: training_step(dataloader_iter) loads batches in the middle of a step; let it take the batch"
            )
        assert fetcher is not None
        ahead = int(fetcher.length is None)  # Lightning loads one batch ahead where it does not know how many there are
        at = (trainer.fit_loop.epoch_progress.total.ready, fetcher.fetched)
        if at == self._at or ahead > fetcher.fetched:  # of several loaders the first; not when the iterator is made
            return
        if self._loaded is not None:
            self._restore(trainer, ahead)
            at = (trainer.fit_loop.epoch_progress.total.ready, fetcher.fetched)
            self._saved, self._saved_at = steps_of(trainer), time.monotonic()
        self._at = at
        if not loop._accumulated_batches_reached():
            return
        step = steps_of(trainer)
        if step == 0 and in_pieces(trainer):
            return  # to save an optimizer that has no state yet, torch lets it take a step, which Adam would count
        by_step = self.every_n_steps is not None and step % self.every_n_steps == 0
        by_clock = self.every_seconds is not None and time.monotonic() - self._saved_at >= self.every_seconds
        due, stop = self._agree(trainer, self._saved < 0 or by_step or by_clock, self._signal or 0)
        if (due or stop) and step != self._saved:
            self._save(trainer, "batch")
        if stop:
            self._stop(trainer, stop)

    def _agree(self, trainer: Trainer, due: bool, stop: int) -> tuple[bool, int]:
        """What any process wants, all do: saving takes them all."""
        if trainer.world_size == 1:
            return due, stop
        wanted = torch.tensor([int(due), stop], device=trainer.strategy.root_device)
        all_reduce_(wanted, op=dist.ReduceOp.MAX)
        due_of_all, stop_of_all = wanted.tolist()
        return bool(due_of_all), stop_of_all

    def _save(self, trainer: Trainer, clean: str) -> None:
        self._clean = clean
        try:
            if in_pieces(trainer):
                trainer.save_checkpoint(temporary(self.path), weights_only=False)
                if trainer.is_global_zero:
                    publish(temporary(self.path), self.path)
                trainer.strategy.barrier()
            else:
                trainer.save_checkpoint(self.path, weights_only=False)
        finally:
            self._clean = ""
        self._saved, self._saved_at = steps_of(trainer), time.monotonic()
        self.last_model_path = str(self.path)

    # What a checkpoint holds beside Lightning's.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out: random states and sums of the epoch so far, of every process."""
        mine: dict[str, Any] = {"rng": rng_state(), "results": results(trainer) if self._clean == "batch" else {}}
        every = [mine]
        if trainer.world_size > 1:
            every = [{}] * trainer.world_size
            dist.all_gather_object(every, mine)
        metrics = {key: value.detach().cpu() for key, value in trainer.callback_metrics.items()} if self._clean else {}
        checkpoint[KEY] = {"clean": self._clean, "processes": every, "metrics": metrics}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what :meth:`on_save_checkpoint` added; begin TensorBoard's curves anew from the step of the checkpoint."""
        if trainer.state.fn != "fit" or KEY not in checkpoint:
            return
        saved = checkpoint.get("state_dict", {})  # none, where the strategy saves pieces
        self._rounded = saved if other_dtypes(saved, pl_module.state_dict()) else None
        self._loaded = {**checkpoint[KEY], "loops": checkpoint["loops"]["fit_loop"]}
        step = self._loaded["loops"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        step = step if self._loaded["clean"] else max(step, checkpoint["global_step"])
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                forget_from(logger.experiment, step)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load weights again: with precision="64-true" Lightning widens the module when float32 holds them already."""
        if self._rounded is not None:
            pl_module.load_state_dict(self._rounded, strict=pl_module.strict_loading)
            self._rounded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch signals; tell Lightning where the loaders are, and that nothing is half done."""
        if self._loaded is not None:
            load_loaders(trainer)
        if self._loaded is not None and self._loaded["clean"]:
            nothing_is_half_done(trainer)
        if self._trainer is not None and threading.current_thread() is threading.main_thread():
            self._handlers = {each: signal.signal(each, self._catch) for each in (signal.SIGINT, signal.SIGTERM)}

    def _restore(self, trainer: Trainer, ahead: int) -> None:
        """Put everything where it was at the same moment of the run that wrote the checkpoint."""
        loaded, self._loaded = self._loaded, None
        assert loaded is not None
        processes = loaded["processes"]
        mine = processes[trainer.global_rank if len(processes) == trainer.world_size else 0]
        fit_loop = trainer.fit_loop
        if loaded["clean"] == "batch":
            fit_loop.load_state_dict(loaded["loops"])
            fit_loop._combined_loader_states_to_load = []
            nothing_is_half_done(trainer)
            assert fit_loop._data_fetcher is not None
            fit_loop._data_fetcher.fetched = fit_loop.epoch_loop.batch_progress.current.ready + ahead
            self._results = dict(mine["results"])
        trainer._logger_connector._callback_metrics.update(loaded["metrics"])
        set_rng_state(mine["rng"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Add what the epoch had logged before the checkpoint to what is logged now."""
        add_results(trainer, self._results)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, of what is logged once an epoch."""
        add_results(trainer, self._results)
        self._results = {}

    # The end.

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the next moment between batches comes soon."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, from which a larger max_epochs goes on."""
        if self._trainer is not None:
            self._save(trainer, "end")
            if self._signal:
                self._stop(trainer, self._signal)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        self._handlers = {}
        if self._process is not None:
            trainer.strategy.process_dataloader = self._process  # type: ignore[method-assign,assignment]
        self._process = self._trainer = self._loaded = self._rounded = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")

    def _catch(self, signum: int, frame: Any) -> None:
        if self._signal == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self._signal = signum
        again = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
        rank_zero_info(f"\n{signal.Signals(signum).name}: the training saves after this step, and ends{again}")

    def _stop(self, trainer: Trainer, signum: int) -> None:
        if not self.quiet:
            cli = any(isinstance(callback, SaveConfigCallback) for callback in callbacks_of(trainer))
            words = [word for word in sys.orig_argv if not word.startswith("--ckpt_path")]
            command = f"{shlex.join(words)} --ckpt_path=last" if cli else 'trainer.fit(..., ckpt_path="last")'
            rank_zero_info(f"Step {steps_of(trainer)} is saved in {self.path}. To go on: {command}")
        raise KeyboardInterrupt if signum == signal.SIGINT else SIGTERMException(128 + signum)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the checkpoint itself says where it is."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""
