"""Predictions beside their targets: a confusion matrix for classes, a scatter plot for numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchcalc.instruments.figures import COLOURS, INK, new_figure, new_sheet, write
from torchcalc.instruments.instrument import Instrument, check_at_least_one, guarded, steps_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Predictions", "confusion_figure", "confusion_matrix", "scatter_figure"]

Task = Literal["classification", "regression"]


def confusion_matrix(output: Tensor, target: Tensor, classes: int | None = None) -> Tensor:
    """Count how often each class was taken for each.

    Args:
        output: logits or probabilities per class, (N, C, ...), of which the largest wins; or of a binary decision, (N,) or
            (N, 1), as logits, of which positive ones win.
        target: the true classes, (N, ...), as integers; negative ones (``ignore_index``) do not count.
        classes: rows and columns, at least C, >= 2; needed only where more than C, or for binary outputs 2, are wanted.

    Returns:
        int64, (classes, classes): rows are true, columns predicted classes; on the CPU.

    Raises:
        ValueError: shapes that do not fit together, a target that is no class, or fewer classes than outputs.

    >>> confusion_matrix(torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]), torch.tensor([0, 1, 1]))
    tensor([[1, 0],
            [1, 1]])
    """
    binary = output.dim() < 2 or output.shape[1] == 1
    least = 2 if binary else output.shape[1]
    count = least if classes is None else classes
    if count < least:
        raise ValueError(f"classes={count}: the outputs, {tuple(output.shape)}, are for {least}; give at least as many")
    predicted = (output > 0).long().flatten() if binary else output.argmax(1).flatten()
    true = target.long().flatten()
    if predicted.shape != true.shape:
        raise ValueError(f"output {tuple(output.shape)} and target {tuple(target.shape)} do not fit; see Args")
    predicted, true = predicted[true >= 0], true[true >= 0]
    if len(true) and int(true.max()) >= count:
        raise ValueError(f"target: there is a class {int(true.max())}, but outputs for {count} classes")
    return torch.bincount(true * count + predicted, minlength=count * count).view(count, count).cpu()


def confusion_figure(matrix: Tensor, names: Sequence[str] | None = None, *, title: str = "") -> Figure:
    """Draw a confusion matrix: the shade is the share of the true class, errors are red, the numbers are counts.

    Args:
        matrix: counts, (C, C), rows are true classes.
        names: of the C classes; their numbers by default.
        title: the accuracy by default.

    Raises:
        ValueError: matrix not square, or not C names.
        ImportError: there is no matplotlib.

    >>> figure = confusion_figure(torch.tensor([[9, 1], [0, 10]]), ["cat", "dog"])
    >>> [text.get_text() for text in figure.axes[0].texts][:3]
    ['9', '1', '10']
    """
    count = len(matrix)
    if matrix.dim() != 2 or matrix.shape[1] != count or not count:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}: must be (C, C), rows true, columns predicted")
    if names is not None and len(names) != count:
        raise ValueError(f"names: {len(names)} for {count} classes")
    labels = [*names] if names is not None else [str(i) for i in range(count)]
    from matplotlib.patches import Rectangle

    share = matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)
    # White, towards blue where right and towards red where wrong: one wrong in ten is to be seen, hence the root.
    blue, red = (torch.tensor(c, dtype=torch.float64, device="cpu") for c in ((0.03, 0.35, 0.60), (0.80, 0.15, 0.10)))
    colour = torch.where(torch.eye(count, dtype=torch.bool, device="cpu")[..., None], blue, red)
    image = 1 + (colour - 1) * share.sqrt()[..., None]
    longest, width, height = max(map(len, labels)), 6.0, 5.6
    left, right, bottom, top = 0.5 + 0.07 * longest, width - 0.1, 0.5, height - 0.35
    upright = longest > 3
    bottom += 0.07 * longest if upright else 0
    figure, ax = new_sheet(width, height)
    grid = (torch.linspace(a, b, count + 1, device="cpu").numpy() for a, b in ((left, right), (top, bottom)))
    ax.pcolormesh(*grid, image.numpy())
    ax.set(xlim=(0, width), ylim=(0, height))
    x = [left + (right - left) * (j + 0.5) / count for j in range(count)]
    y = [top - (top - bottom) * (i + 0.5) / count for i in range(count)]
    size = 9 if count <= 12 else 7
    if count <= 20:
        for i, j in matrix.nonzero().tolist():
            write(ax, x[j], y[i], str(int(matrix[i, j])), size, color="white" if share[i, j] > 0.3 else INK)
    for i in range(0, count, math.ceil(count / 40)):
        write(ax, x[i], bottom - 0.07, labels[i], size - 1, va="top", rotation=90 if upright else 0)
        write(ax, left - 0.07, y[i], labels[i], size - 1, ha="right")
    total = int(matrix.sum())
    accuracy = f"accuracy {100 * int(matrix.trace()) / max(total, 1):.1f} % of {total}"
    write(ax, (left + right) / 2, height - 0.17, title or accuracy, 10)
    write(ax, (left + right) / 2, 0.15, "predicted", 9)
    write(ax, 0.15, (bottom + top) / 2, "true", 9, rotation=90)
    ax.add_patch(Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor="#BBBBBB", linewidth=0.8))
    return figure


def scatter_figure(output: Tensor, target: Tensor, *, title: str = "") -> Figure:
    """Draw predicted against true numbers, with the diagonal on which they would agree.

    Args:
        output, target: numbers of the same count N, any shape.
        title: R², the share of the targets' variance that is explained, by default.

    Raises:
        ValueError: different counts, or none.
        ImportError: there is no matplotlib.

    >>> scatter_figure(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0])).axes[0].get_title()
    'R² = 1.000, 3 points'
    """
    predicted, true = (t.detach().double().flatten().cpu() for t in (output, target))
    if predicted.shape != true.shape or not len(true):
        raise ValueError(
            f"output {tuple(output.shape)} and target {tuple(target.shape)}: must be as many, and not none"
        )
    residual, spread = (predicted - true).square().sum(), (true - true.mean()).square().sum()
    r2 = float(1 - residual / spread) if spread else math.nan
    figure, ax = new_figure(5.6, 5.6, margins=(0.65, 0.1, 0.55, 0.4))
    finite = torch.cat([predicted, true])
    finite = finite[finite.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    room = 0.04 * (high - low) or 1.0
    ends = (low - room, high + room)
    ax.plot(ends, ends, color="#999999", linewidth=1, linestyle="--", zorder=1)
    size, alpha = (18, 0.6) if len(true) <= 500 else (6, 0.35)
    ax.scatter(true.numpy(), predicted.numpy(), s=size, alpha=alpha, color=COLOURS[1], linewidths=0, zorder=2)
    ax.set(xlim=ends, ylim=ends, xlabel="true", ylabel="predicted")
    ax.set_title(title or f"R² = {r2:.3f}, {len(true)} points")
    return figure


class Predictions(Instrument):
    """What the network predicts on the validation set: a confusion matrix or a scatter plot, ``figures/predictions``.

    Nothing is computed twice: a hook takes the outputs while validation runs. Classes are recognised by integer targets.
    Under DDP the counts of all ranks are added up; a scatter plot shows those of rank zero.

    Args:
        module: the submodule whose output is the prediction, such as ``net``; None: the only child of the LightningModule
            that has parameters, or if there are several, the LightningModule itself, if validation calls it.
        target: where the targets are in a batch: a position, or a key of a dict.
        task: "classification" or "regression"; None: by the dtype of the targets.
        classes: names of the classes, in order.
        every_n_epochs: draw after every n-th validation, >= 1, as far as the budget allows.
        max_points: of the scatter plot, >= 1: the first so many.
        budget: share of the training time that drawing may take before the end, in (0, 1); None: no limit.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: no such submodule; no logger.

    >>> Predictions(module="net").target
    1
    """

    def __init__(
        self,
        *,
        module: str | None = None,
        target: int | str = 1,
        task: Task | None = None,
        classes: list[str] | None = None,
        every_n_epochs: int = 1,
        max_points: int = 2000,
        budget: float | None = 0.01,
    ) -> None:
        super().__init__(every_n_steps=None, budget=budget)
        check_at_least_one("every_n_epochs", every_n_epochs)
        check_at_least_one("max_points", max_points)
        if task not in (None, "classification", "regression"):
            raise ValueError(f"task={task!r}: must be 'classification', 'regression' or None")
        self.module, self.target, self.task, self.classes = module, target, task, classes
        self.every_n_epochs, self.max_points = every_n_epochs, max_points
        self.hook: RemovableHandle | None = None
        self.output: Tensor | None = None
        self.matrix: Tensor | None = None
        self.points: list[tuple[Tensor, Tensor]] = []
        self.fresh = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.source(pl_module)

    def source(self, pl_module: LightningModule) -> nn.Module:
        """Return the module whose output is the prediction."""
        if self.module is not None:
            try:
                return pl_module.get_submodule(self.module)
            except AttributeError:
                names = ", ".join(name for name, _ in pl_module.named_children())
                raise MisconfigurationException(
                    f"Predictions: module={self.module!r}: there is no such submodule; children are: {names}"
                ) from None
        having = [child for child in pl_module.children() if any(True for _ in child.parameters())]
        return having[0] if len(having) == 1 else pl_module

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last epoch; listen to the outputs."""
        self.stop()
        self.matrix, self.points, self.fresh = None, [], False
        if not (self.off or trainer.sanity_checking):
            self.hook = self.source(pl_module).register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output.detach() if isinstance(output, Tensor) else None

    @guarded
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count, or keep, the predictions of a batch of the first dataloader."""
        output, self.output = self.output, None
        if self.hook is None or dataloader_idx:
            return
        try:
            target = batch[self.target]
        except (LookupError, TypeError):
            target = None
        if output is None:
            raise ValueError("there is no output of the network; set module= and target=")
        if not isinstance(target, Tensor):
            raise ValueError(
                f"there is no target at {self.target!r} of a {type(batch).__name__}; set module= and target="
            )
        if (self.task or ("regression" if target.is_floating_point() else "classification")) == "classification":
            found = confusion_matrix(output, target, len(self.classes) if self.classes else None)
            self.matrix = found if self.matrix is None else self.matrix + found
        elif output.numel() != target.numel():
            raise ValueError(f"output {tuple(output.shape)} and target {tuple(target.shape)} do not fit; set module=")
        elif (room := self.max_points - sum(len(t) for _, t in self.points)) > 0:
            self.points.append((output.flatten()[:room].float().cpu(), target.flatten()[:room].float().cpu()))

    def stop(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        self.hook = self.output = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the epoch on all ranks, or, if one of them has failed, on none: adding up would wait for it."""
        if not trainer.sanity_checking:
            self.add_up(trainer, pl_module, trainer.strategy.reduce_boolean_decision(not self.off))

    @guarded
    def add_up(self, trainer: Trainer, pl_module: LightningModule, everywhere: bool) -> None:
        """Add up over the ranks; draw, if it is time to and the budget allows it."""
        if not everywhere:
            raise RuntimeError("it has failed on another rank")
        self.stop()
        if self.matrix is not None and trainer.world_size > 1:
            total = trainer.strategy.reduce(self.matrix.to(pl_module.device), reduce_op="sum")
            assert isinstance(total, Tensor)
            self.matrix = total.cpu()
        self.fresh = True
        if trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs == 0 and self.affords():
            self.write_figures(trainer, steps_of(trainer))  # the step is counted after its validation

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It is validation that decides when to draw."""

    def draw(self, trainer: Trainer) -> dict[str, Figure]:
        if not self.fresh:
            return {}
        self.fresh = False
        if self.matrix is not None:
            return {"figures/predictions": confusion_figure(self.matrix, self.classes)}
        if self.points:
            output, target = (torch.cat(each) for each in zip(*self.points, strict=True))
            return {"figures/predictions": scatter_figure(output, target)}
        return {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind, also after an error."""
        self.stop()
