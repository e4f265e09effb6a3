"""The default set of instruments as one callback."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from torchcalc.instruments.dashboard import Dashboard
from torchcalc.instruments.gradient_flow import GradientFlow
from torchcalc.instruments.instrument import Instrument
from torchcalc.instruments.learning_rate import LearningRate
from torchcalc.instruments.predictions import Predictions
from torchcalc.instruments.sharpness import Sharpness
from torchcalc.instruments.update_ratio import UpdateRatio

__all__ = ["Instruments"]


class Instruments(Callback):
    """Gradient flow, update ratios, learning rate, sharpness, predictions, and the dashboard that shows them.

    Each part keeps to a budget of the training time, together less than 4 %; only the last figures, about 0.04 s each, are
    drawn whatever they cost (``python -m benchmarks instruments`` measures all). Give the parts one by one to set them.
    Sharpness evaluates ``training_step`` some more times: what that does in Python, such as appending to a list, is repeated.
    It needs the memory of about nine copies of the weights, twelve with Adam's preconditioner, and the others of two. A part
    that fails is switched off with a warning, and the training goes on.

    Args:
        every_n_steps: measure once every n batches that step, >= 1; None: the trainer's ``log_every_n_steps``.
        sharpness: leave out the sharpness if False. Where it cannot work, as with manual optimization, it is left out with
            a warning.
        predictions: leave out the predictions if False.

    Raises:
        ValueError: every_n_steps out of range.
        MisconfigurationException: as its other parts do.

    In a YAML: ``- class_path: torchcalc.instruments.Instruments``.

    >>> [type(each).__name__ for each in Instruments(sharpness=False).parts]
    ['GradientFlow', 'UpdateRatio', 'LearningRate', 'Predictions', 'Dashboard']
    """

    def __init__(self, *, every_n_steps: int | None = None, sharpness: bool = True, predictions: bool = True) -> None:
        self.parts: list[Instrument] = [
            GradientFlow(every_n_steps=every_n_steps),
            UpdateRatio(every_n_steps=every_n_steps),
            LearningRate(every_n_steps=every_n_steps),
        ]
        if sharpness:
            self.parts.append(Sharpness(every_n_steps=every_n_steps))
        if predictions:
            self.parts.append(Predictions())
        self.parts.append(Dashboard())

    def tell(self, hook: str, *args: Any) -> None:
        """Call a hook of all parts."""
        for part in self.parts:
            getattr(part, hook)(*args)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for part in [*self.parts]:
            try:
                part.setup(trainer, pl_module, stage)
            except MisconfigurationException as error:
                if not isinstance(part, Sharpness):
                    raise
                self.parts.remove(part)
                rank_zero_warn(
                    f"Instruments leaves the sharpness out, as sharpness=False would without a warning: {error}"
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.tell("teardown", trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell("on_train_start", trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.tell("on_train_batch_start", trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.tell("on_before_optimizer_step", trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tell("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell("on_train_epoch_end", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell("on_train_end", trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell("on_validation_epoch_start", trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.tell("on_validation_batch_end", trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell("on_validation_end", trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell("on_validation_epoch_end", trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.tell("on_exception", trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        return {type(part).__name__: state for part in self.parts if (state := part.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self.parts:
            if (state := state_dict.get(type(part).__name__)) is not None:
                part.load_state_dict(state)
