"""A language model: a GPT of torchcalc's parts learns English by predicting the next word, in bits per byte.

It reads the documentation that ships with Python, or ``--data.file=FILE``, and ends with its bits per byte on text that it
has not seen beside those of lzma, and with the speed and memory of its parts beside torch's. ``--model.parts=torch`` trains
the same model of torch's parts. Longer: ``--trainer.max_steps=5000``; larger: ``--model.width=512 --model.layers=8``; on
a GPU: ``--trainer.precision=bf16-mixed --model.compile=true``.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from recipes import checkpoints
from recipes.against_stock import Cost, compare
from recipes.cli import RecipeCLI
from recipes.gpt import GPT, Kind
from recipes.text import IGNORED, Text
from torchcalc.distributed import normalizer


class LanguageModel(LightningModule):
    """A GPT with AdamW, whose learning rate rises over the first steps and falls to a tenth by half a cosine.

    Args:
        width, layers, heads: of the net; width is a multiple of heads.
        parts: torchcalc's or torch's.
        lr: the largest learning rate.
        weight_decay: of matrices.
        warmup: steps until lr is reached.
        compile: torch.compile the net.
        against_stock: steps that both kinds of parts take side by side when training ends; 0 leaves it out.
        sample: words of a text that is written at each validation.
    """

    many = True  # processes may share a batch

    def __init__(
        self,
        width: PositiveInt = 128,
        layers: PositiveInt = 4,
        heads: PositiveInt = 4,
        parts: Kind = "torchcalc",
        lr: PositiveFloat = 3e-3,
        weight_decay: NonNegativeFloat = 0.1,
        warmup: NonNegativeInt = 50,
        compile: bool = False,
        against_stock: NonNegativeInt = 12,
        sample: NonNegativeInt = 48,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width}: must be a multiple of heads={heads}")
        self.shape, self.parts = (width, layers, heads), parts
        self.lr, self.weight_decay = float(lr), float(weight_decay)  # plain, as a checkpoint must be
        self.warmup, self.compiles, self.steps, self.words = warmup, compile, against_stock, sample
        self.net: GPT | None = None
        self.normalizer: Tensor | None = None
        self.bits = math.nan  # per byte, on the test set

    @property
    def data(self) -> Text:
        data: Text = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def make(self, kind: Kind) -> GPT:
        """A net of either kind; under the run's seed both begin alike."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed() % 2**32)
            return GPT(self.data.vocabulary, self.data.context, *self.shape, kind=kind)

    def configure_model(self) -> None:
        if self.net is None:  # the data says how many words there are
            self.net = self.make(self.parts)
            if self.device_mesh is not None:  # --trainer.strategy=ModelParallelStrategy
                mesh = self.device_mesh["data_parallel"]
                for part in (*self.net.blocks, self.net):
                    fully_shard(part, mesh=mesh)
            if self.compiles:
                self.net.compile()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Only now there is a net to compare with."""
        if "state_dict" in checkpoint:  # pieces of FSDP2 are compared while they are read
            checkpoints.compare(Path(str(self.trainer.ckpt_path)), checkpoint, self)

    def configure_optimizers(self) -> Any:
        assert self.net is not None
        optimizer = self.net.optimizer(self.lr, self.weight_decay)
        total = self.trainer.estimated_stepping_batches
        schedule = LambdaLR(optimizer, partial(rise_and_fall, warmup=self.warmup, total=total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self.trainer.world_size > 1:  # here, since instruments call training_step on one process alone
            self.normalizer = normalizer(batch[1].numel(), device=self.device)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert self.net is not None
        loss: Tensor = self.net(*batch, normalizer=self.normalizer)
        self.log("loss/train", loss, prog_bar=True)
        return loss

    def evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        assert self.net is not None
        words, target = batch
        count = int((target != IGNORED).sum())
        loss = self.net(words, target)
        bits = loss * self.data.words_per_byte(stage) / math.log(2)
        found = {f"loss/{stage}": loss, f"bits_per_byte/{stage}": bits}
        self.log_dict(found, batch_size=count, prog_bar=True, sync_dist=True)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        if self.words and isinstance(self.logger, TensorBoardLogger) and not self.trainer.sanity_checking:
            assert self.net is not None
            start = self.data.words["val"][:8].to(self.device)
            text = self.net.generate(start, self.words, self.data.context)
            written = self.data.encoder.decode(text.tolist())
            if self.trainer.is_global_zero:
                self.logger.experiment.add_text("sample", f"```\n{written}\n```", self.global_step)

    def on_test_epoch_end(self) -> None:
        self.bits = float(self.trainer.callback_metrics.get("bits_per_byte/test", math.nan))

    def report(self) -> str:
        """The text, bits per byte beside lzma's, and both kinds of parts side by side."""
        data = self.data
        alone, after = data.lzma_bits("test")
        pieces = f"{data.vocabulary:,} pieces, {1 / data.words_per_byte('test'):.2f} bytes each"
        rows = [
            f"text: {data.name}, {data.size:,} bytes, sha256 {data.hash}; {pieces}",
            f"bits per byte of unseen text: {self.bits:.3f}; lzma {alone:.3f} alone, {after:.3f} after the training text",
        ]
        if self.steps:
            costs = self.against_stock()
            rows.append(f"{self.steps} steps side by side:   loss   ms a step   peak memory")
            rows += [
                f"  {kind:<20} {cost.loss:9.4f} {1e3 * cost.seconds:11.1f} {cost.peak / 1e6:10.1f} MB"
                for kind, cost in costs.items()
            ]
        return "\n".join(rows)

    def against_stock(self) -> dict[Kind, Cost]:
        """Both kinds of parts from the run's seed on."""
        loader = self.data.train_dataloader()
        batches = [batch for batch, _ in zip(loader, range(self.steps), strict=False)]
        return compare(self.make, batches, self.device, self.trainer.precision_plugin.forward_context, self.lr / 10)


def rise_and_fall(step: int, warmup: int, total: float) -> float:
    """What the learning rate is multiplied by: up to 1 in ``warmup`` steps, then to 0.1 by half a cosine.

    >>> [round(rise_and_fall(step, 2, 10), 3) for step in (0, 1, 6, 10)]
    [0.5, 1.0, 0.55, 0.1]
    """
    if step < warmup:
        return (step + 1) / warmup
    part = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * part))


def main(args: list[str]) -> None:
    RecipeCLI("language_model", LanguageModel, Text, args)
