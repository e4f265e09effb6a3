"""Learning rates: their curves, and a range test that chooses one before training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.optim import Optimizer

from torchcalc.calculus.random_numbers import random_numbers_kept
from torchcalc.convergence import range_test
from torchcalc.instruments.instrument import Chart, Instrument, add_figure, callbacks_of, check_at_least_one, guarded
from torchcalc.instruments.objective import Objective, batch_of, check_objective, no_target

__all__ = ["LearningRate", "LearningRateRangeTest", "learning_rates"]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rate of each parameter group, by the group's ``name``, or its number if it has none.

    Args:
        optimizer: of torch or torchcalc.

    >>> import torch
    >>> weight, bias = torch.nn.Linear(2, 1).parameters()
    >>> learning_rates(torch.optim.SGD([{"params": weight, "name": "weight"}, {"params": bias, "lr": 0.5}], lr=0.1))
    {'weight': 0.1, '1': 0.5}
    """
    return {str(group.get("name", i)): float(group["lr"]) for i, group in enumerate(optimizer.param_groups)}


class LearningRate(Instrument):
    """Curve ``lr`` of the learning rate that each measured step was taken with; ``lr/<group>`` if there are several.

    It needs no scheduler, unlike Lightning's ``LearningRateMonitor``; beside that it stays silent. Groups are named by their
    ``name``, or by their number; with several optimizers the number of the optimizer comes before.

    Args:
        every_n_steps: once every n batches that step, >= 1; None: the trainer's ``log_every_n_steps``.

    Raises:
        ValueError: every_n_steps out of range.
        MisconfigurationException: no logger.

    >>> LearningRate(every_n_steps=1).charts()
    [('learning rate', 'learning rate', ['^lr(/|-|$)'])]
    """

    draws = False

    def __init__(self, *, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps=every_n_steps, budget=None)

    def charts(self) -> list[Chart]:
        return [("learning rate", "learning rate", ["^lr(/|-|$)"])]  # lr-SGD is LearningRateMonitor's

    @guarded
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Write the rates, if it is time to."""
        if any(isinstance(each, LearningRateMonitor) for each in callbacks_of(trainer)) or not self.due(
            trainer, optimizer
        ):
            return
        one = len(optimizer.param_groups) == len(trainer.optimizers) == 1
        which = next((i for i, each in enumerate(trainer.optimizers) if each is optimizer), 0)
        before = f"{which}/" if len(trainer.optimizers) > 1 else ""
        rates = learning_rates(optimizer)
        self.write_curves(trainer, {"lr" if one else f"lr/{before}{name}": rate for name, rate in rates.items()})


class LearningRateRangeTest(Instrument):
    """Choose the learning rate by a range test before training, and set it.

    :func:`torchcalc.convergence.range_test` tries rates from ``low`` to ``high`` on a few fixed batches, and puts weights,
    optimizer and random numbers back. Then every group's rate, with what schedulers remember of it, is multiplied by one
    number, so that the largest is the suggestion: ratios between groups and warm-ups stay. The figure is
    ``figures/range_test``. A resumed training keeps its rate; so does one on whose loss the test fails, with a warning. Under
    DDP rank zero tests, and all take its suggestion. The dataset is read from its beginning, before the training does so: an
    IterableDataset must be able to begin again.

    Args:
        low, high: the range, 0 < low < high.
        steps: rates tried, >= 5, each one step.
        batches: of the training dataloader, used in turn, >= 1; each is held on the device.
        objective: name of the LightningModule's method that takes a batch and returns the loss.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: no logger; several optimizers; no such method, or manual optimization without a method
            that returns the loss; parameters in pieces (ModelParallelStrategy, FSDP, DeepSpeed); training data that can be
            read only once; a learning rate of 0.

    >>> LearningRateRangeTest(low=1e-5, high=1.0).steps
    100
    """

    draws = False

    def __init__(
        self,
        *,
        low: float = 1e-6,
        high: float = 10.0,
        steps: int = 100,
        batches: int = 4,
        objective: str = "training_step",
    ) -> None:
        super().__init__(every_n_steps=None, budget=None)
        if not 0 < low < high < math.inf:
            raise ValueError(f"low={low}, high={high}: must be 0 < low < high")
        if steps < 5:
            raise ValueError(f"steps={steps}: must be at least 5")
        check_at_least_one("batches", batches)
        self.low, self.high, self.steps, self.batches, self.objective = low, high, steps, batches, objective
        self.suggestion: float | None = None  #: what was found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_objective("LearningRateRangeTest", trainer, pl_module, self.objective)
            self.suggestion = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test and set, unless this training was resumed."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step > 0:
            return
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"LearningRateRangeTest: one optimizer is needed, not {len(trainer.optimizers)}"
            )
        loaders = trainer.fit_loop._combined_loader
        assert loaders is not None
        if once := next((each for each in loaders.flattened if isinstance(each, Iterator)), None):
            raise MisconfigurationException(
                f"LearningRateRangeTest: the training data are a {type(once).__name__}, and what the test reads of it the "
                "training would miss; pass a DataLoader, or a class whose __iter__ begins anew"
            )
        (optimizer,) = trainer.optimizers
        before = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
        if not before:
            raise MisconfigurationException(
                "LearningRateRangeTest: the optimizer's lr is 0, which no factor changes; any other will do, such as 1e-3"
            )
        if trainer.is_global_zero:
            self.test(trainer, pl_module, CombinedLoader(loaders.iterables, loaders._mode))
        self.suggestion = trainer.strategy.broadcast(self.suggestion)
        if self.suggestion is None:
            if not self.off:
                rank_zero_warn(
                    "LearningRateRangeTest: no rate of the range decreases the loss; the learning rate is left alone"
                )
            return
        scale_rates(trainer, optimizer, self.suggestion / before)
        rank_zero_info(
            f"LearningRateRangeTest: the learning rate is set to {self.suggestion:.3g} (it was {before:.3g})"
        )

    @guarded
    def test(self, trainer: Trainer, pl_module: LightningModule, data: CombinedLoader) -> None:
        """Find the suggestion; write the figure."""
        with random_numbers_kept():
            batches = [self.to_device(trainer, batch) for batch, *_ in islice(data, self.batches)]
        (optimizer,) = trainer.optimizers
        pairs = [((batch,), None) for batch in batches]
        objective = Objective(pl_module, self.objective)
        found = range_test(objective, no_target, pairs, optimizer, low=self.low, high=self.high, steps=self.steps)
        if (writer := self.writer(trainer)) is not None:
            add_figure(writer, "figures/range_test", found.figure(), 0)
        self.suggestion = found.suggestion if math.isfinite(found.suggestion) else None

    def to_device(self, trainer: Trainer, batch: Any) -> Any:
        """Treat a batch as the training loop does."""
        module = trainer.lightning_module
        batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        return batch_of(trainer.strategy.batch_to_device(batch, dataloader_idx=0))


def scale_rates(trainer: Trainer, optimizer: Optimizer, factor: float) -> None:
    """Multiply the rates of all groups, and what schedulers remember of them."""
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):  # the latter two are OneCycleLR's
            if isinstance(group.get(key), Tensor):
                group[key].mul_(factor)
            elif key in group:
                group[key] *= factor
    for config in trainer.lr_scheduler_configs:
        for scheduler in family(config.scheduler):
            for key in ("base_lrs", "max_lrs", "_last_lr"):
                if isinstance(rates := getattr(scheduler, key, None), list):
                    setattr(scheduler, key, [rate * factor for rate in rates])


def family(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those that it is made of, as SequentialLR is."""
    yield scheduler
    for each in getattr(scheduler, "_schedulers", ()):
        yield from family(each)
