"""What the callbacks share: when they measure, what that may cost, and where it goes.

Curves go to every logger of the trainer, at the same steps as Lightning's own (batches that ended in an optimizer step);
images go to TensorBoard. Under DDP the gradients, and so what is measured, are the same everywhere: rank zero writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from torchcalc.instruments.figures import pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.optim import Optimizer

__all__ = ["Chart", "Instrument"]

#: One chart of the dashboard: its section, its title, and regular expressions of the tags drawn in it.
Chart = tuple[str, str, list[str]]

# Strategies of Lightning under which a rank holds only pieces of the parameters, and not as DTensors that know the whole.
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy")

Hook = TypeVar("Hook", bound=Callable[..., None])


def guarded(hook: Hook) -> Hook:
    """A hook whose failure switches its instrument off and is told once: the user's training must not end by it."""

    @wraps(hook)
    def run(self: Instrument, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.off:
            return
        try:
            hook(self, trainer, pl_module, *args)
        except Exception as error:  # not KeyboardInterrupt
            self.off = True
            self.teardown(trainer, pl_module, "fit")
            why = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"{type(self).__name__}: {why}; it is switched off, and the training goes on")

    return cast(Hook, run)


class Instrument(Callback):
    """Base class of the callbacks: a subclass measures in ``guarded`` hooks when :meth:`due`, and draws in :meth:`draw`.

    Args:
        every_n_steps: measure at the first optimizer step of every n batches; None: the trainer's ``log_every_n_steps``.
        budget: the share of the training time, 0 < budget < 1, that costly work of this instrument may take: work that
            would exceed it is put off. At the end of training figures are drawn in any case. None: no limit.
    """

    draws = True  #: whether there is a figure, for which TensorBoard is needed
    whole = True  #: whether the parameters are needed in one piece

    def __init__(self, *, every_n_steps: int | None, budget: float | None) -> None:
        check_at_least_one("every_n_steps", every_n_steps, or_none=True)
        if budget is not None and not 0 < budget < 1:
            raise ValueError(f"budget={budget}: must be a share of the training time between 0 and 1, or None")
        self.every_n_steps, self.budget = every_n_steps, budget
        self.spent, self.dearest = 0.0, 0.2  # seconds; a guess, until something has been done
        self.started = time.perf_counter()
        self.measured: dict[int, int] = {}  # by optimizer, the step of its last measurement
        self.drawn = -1  # the step at which figures were written last
        self.off = False  # whether it has failed

    # What a subclass may supply.

    def charts(self) -> list[Chart]:
        """Return the charts of this instrument's curves for the dashboard."""
        return []

    def draw(self, trainer: Trainer) -> dict[str, Figure]:
        """Return the figures of what has been measured so far by tag; none if that is nothing yet."""
        return {}

    # When.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, or say, what cannot work, before training."""
        self.off = False
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        name = type(self).__name__
        if type(trainer.strategy).__name__ in SHARDED:
            raise MisconfigurationException(
                f"{name}: under {type(trainer.strategy).__name__} a rank sees pieces of the parameters only; "
                "use ModelParallelStrategy (FSDP2) or DDP, or leave the instrument out"
            )
        if not trainer.loggers:
            raise MisconfigurationException(f"{name}: the trainer has no logger to write to; set trainer.logger")
        if self.draws and self.writer(trainer) is None and trainer.is_global_zero:
            kinds = ", ".join(type(logger).__name__ for logger in trainer.loggers)
            rest = "only curves are" if self.charts() else "nothing is"
            rank_zero_warn(f"{name}: TensorBoard's pages need a TensorBoardLogger, here is {kinds}: {rest} written")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock that the budget is a share of."""
        self.started, self.spent, self.drawn = time.perf_counter(), 0.0, -1

    def due(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """Tell whether this step of the optimizer is to be measured, and remember it as measured if so."""
        n = self.every_n_steps or getattr(trainer, "log_every_n_steps", 0) or 1
        optimizers = trainer.optimizers
        which = 0 if len(optimizers) == 1 else next((i for i, o in enumerate(optimizers) if o is optimizer), 0)
        now, last = steps_of(trainer), self.measured.get(which)
        if last is not None and now // n == last // n:
            return False
        self.measured[which] = now
        return True

    def affords(self) -> bool:
        """Tell whether work as dear as the dearest so far is within the budget."""
        return self.budget is None or self.spent + self.dearest <= self.budget * self.elapsed()

    def elapsed(self) -> float:
        """Seconds since the training began."""
        return time.perf_counter() - self.started

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count what runs inside against the budget."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            cost = time.perf_counter() - begin
            self.spent, self.dearest = self.spent + cost, max(self.dearest, cost)

    # Where to.

    def write_curves(self, trainer: Trainer, values: Mapping[str, float]) -> None:
        """Write scalars by tag to every logger, at the current step."""
        if values and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(dict(values), step=steps_of(trainer))

    def writer(self, trainer: Trainer) -> Any:
        """Return the SummaryWriter of the trainer's first TensorBoardLogger, or None."""
        found = (logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
        return next(found, None)

    def write_figures(self, trainer: Trainer, step: int | None = None) -> None:
        """Draw, and write what was drawn to TensorBoard, at a step: the last one that was taken, by default."""
        step = max(0, steps_of(trainer) - 1) if step is None else step
        if step == self.drawn or not trainer.is_global_zero or (writer := self.writer(trainer)) is None:
            return
        self.drawn = step
        with self.spending():
            for tag, figure in self.draw(trainer).items():
                add_figure(writer, tag, figure, step)

    @guarded
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, if the budget allows it."""
        if self.draws and self.affords():
            self.write_figures(trainer)

    @guarded
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was measured."""
        if self.draws:
            self.write_figures(trainer)

    @guarded
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what was measured until the user interrupted the training; let go of it: Lightning calls no teardown then."""
        try:
            if self.draws and isinstance(exception, KeyboardInterrupt):
                self.write_figures(trainer)
        finally:
            self.teardown(trainer, pl_module, "fit")


def add_figure(writer: Any, tag: str, figure: Figure, step: int) -> None:
    """``writer.add_figure`` without pyplot."""
    writer.add_image(tag, pixels(figure), step, dataformats="HWC")


def steps_of(trainer: Trainer) -> int:
    """The x-axis of Lightning's own curves: batches that ended in an optimizer step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks: Lightning sets the attribute, but does not declare it."""
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def check_at_least_one(name: str, value: int | None, *, or_none: bool = False) -> None:
    if value is None and or_none:
        return
    if value is None or value < 1:
        raise ValueError(f"{name}={value}: must be at least 1{', or None' * or_none}")
