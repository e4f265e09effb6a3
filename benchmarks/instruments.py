"""What the default set of instruments costs: the digits recipe's training with it and without, call by call in turn.

The ratio is the time without divided by the time with them: 0.95 is a cost of 5 % of the training. Both sides train the same
steps from the same start, in TensorBoard, without progress bar and checkpoints.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.harness import Row

EPOCHS = 20  # as configs/digits.yaml has it


def fit(data: Any, instruments: bool, epochs: int) -> list[torch.Tensor]:
    """Train the digits recipe's network with its config's settings; return its weights."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from recipes.digits import Classifier, ConvNet
    from torchcalc.instruments import Instruments
    from torchcalc.nn import CrossEntropyLoss
    from torchcalc.optim import AdamW

    torch.manual_seed(0)
    module = Classifier(ConvNet(), CrossEntropyLoss(label_smoothing=0.1))
    optimizer = AdamW(module.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.85)
    module.configure_optimizers = lambda: ([optimizer], [scheduler])  # type: ignore[method-assign]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            log_every_n_steps=10,
            logger=TensorBoardLogger(folder, default_hp_metric=False),
            callbacks=[Instruments()] if instruments else [],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data)
    return [p.detach() for p in module.parameters()]


def make(epochs: int = EPOCHS) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], None]]:
    from recipes.data import Digits

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = Digits()

    def stock() -> Any:
        return fit(data, False, epochs)

    def ours() -> Any:
        return fit(data, True, epochs)

    def same() -> None:
        """Instruments change nothing: neither the weights nor the order of the data, to the last bit."""
        for a, b in zip(stock(), ours(), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)

    return stock, ours, same


def rows() -> Iterator[Row]:
    yield Row(
        "instruments, digits",
        against="training without",
        make=make,
        target=0.95,
        group="instruments",
        seconds=60.0,
        quick=False,
    )
