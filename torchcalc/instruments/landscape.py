"""The loss landscape around the path of a training, drawn when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from torchcalc.calculus import training_loss
from torchcalc.instruments.instrument import Instrument, check_at_least_one, guarded
from torchcalc.instruments.loss_surface import loss_plane, loss_slice
from torchcalc.instruments.objective import Objective, batch_of, check_objective, no_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Landscape"]


class Landscape(Instrument):
    """The loss on a plane with the training's path on it, or on the line from its first to its last weights.

    Written as ``figures/landscape`` when training ends. The loss is that of one fixed batch, the first of the training,
    with one dropout mask, in the module's dtype without autocast. The price is resolution² (plane) or some 2·resolution
    (slice) forward passes of that batch, and memory of the host for the snapshots. Under DDP rank zero evaluates, of its
    own batch. After a resume the path begins where the training was resumed.

    Args:
        kind: "plane", through the last weights along the path's two principal directions, or "slice".
        every_n_steps: take a snapshot of the weights at the first step of every n batches, >= 1; None: the trainer's
            ``log_every_n_steps``.
        max_snapshots: when there are so many, >= 3, every second one is dropped.
        examples: of the batch, at most so many are used, >= 1; None: all.
        resolution: evaluations along each direction, >= 2.
        objective: name of the LightningModule's method that takes a batch and returns the loss.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: no logger, no such method, or manual optimization without a method that returns the loss.

    >>> Landscape(kind="slice").kind
    'slice'
    """

    def __init__(
        self,
        *,
        kind: Literal["plane", "slice"] = "plane",
        every_n_steps: int | None = None,
        max_snapshots: int = 32,
        examples: int | None = 128,
        resolution: int = 21,
        objective: str = "training_step",
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, budget=None)
        if kind not in ("plane", "slice"):
            raise ValueError(f"kind={kind!r}: must be 'plane' or 'slice'")
        if max_snapshots < 3 or resolution < 2:
            raise ValueError(f"max_snapshots={max_snapshots}, resolution={resolution}: must be at least 3 and 2")
        check_at_least_one("examples", examples, or_none=True)
        self.kind, self.max_snapshots, self.examples = kind, max_snapshots, examples
        self.resolution, self.objective = resolution, objective
        self.module: LightningModule | None = None
        self.batch: Any = None
        self.snapshots: list[dict[str, Tensor]] = []
        self.stride = self.seen = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_objective("Landscape", trainer, pl_module, self.objective)
            self.module, self.batch, self.snapshots, self.stride, self.seen = pl_module, None, [], 1, 0
            self.measured = {}

    @guarded
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the first batch."""
        if self.batch is None and trainer.is_global_zero:
            self.batch = batch_of(batch, self.examples)

    @guarded
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take a snapshot, if it is time to."""
        if self.due(trainer, optimizer) and trainer.is_global_zero:
            if self.seen % self.stride == 0:
                if len(self.snapshots) == self.max_snapshots:
                    self.snapshots, self.stride = self.snapshots[::2], self.stride * 2
                if self.seen % self.stride == 0:
                    self.snapshots.append(self.snapshot(pl_module))
            self.seen += 1

    def snapshot(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """Copies of the trainable parameters, on the host, named as :class:`Objective` names them."""
        found = pl_module.named_parameters()
        return {f"module.{name}": p.detach().to("cpu", copy=True) for name, p in found if p.requires_grad}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It is drawn at the end only."""

    def draw(self, trainer: Trainer) -> dict[str, Figure]:
        if self.module is None or self.batch is None or not self.snapshots:
            return {}
        loss = training_loss(Objective(self.module, self.objective), no_target, [((self.batch,), None)])
        last = self.snapshot(self.module)
        path = [each for each in self.snapshots if each.keys() == last.keys()] + [
            last
        ]  # less those before an unfreezing
        device = self.module.device
        if self.kind == "plane":
            plane = loss_plane(loss, path, resolution=self.resolution, device=device)
            return {"figures/landscape": plane.figure()}
        ends = ({name: p.to(device) for name, p in point.items()} for point in (path[0], path[-1]))
        return {"figures/landscape": loss_slice(loss, *ends, points=6 * -(-self.resolution // 3) + 1).figure()}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the batch and the snapshots."""
        self.module, self.batch, self.snapshots = None, None, []
