"""The dashboard: a layout for TensorBoard's tab "Custom Scalars", made from what is logged and from the instruments there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lightning.pytorch import Callback, LightningModule, Trainer

from torchcalc.instruments.instrument import Chart, Instrument, callbacks_of, guarded

__all__ = ["Dashboard", "layout"]

Layout = dict[str, dict[str, list[object]]]

STAGE = "(?:train|val|test)"


def layout(groups: Iterable[str], charts: Iterable[Chart] = ()) -> Layout:
    """Return a layout for ``writer.add_custom_scalars``.

    Args:
        groups: prefixes of tags that belong into one chart: "loss" for ``loss/train`` and ``loss/val``, or for
            ``train_loss`` and ``val_loss``, or ``train/loss`` and ``val/loss``.
        charts: section, title and regular expressions of tags, of further charts. Charts of the same section and title
            become one.

    Returns:
        Sections, the training's own first, to charts, to what is drawn in them.

    >>> layout([], [("sharpness", "learning rate", ["^lr$"])])
    {'sharpness': {'learning rate': ['Multiline', ['^lr$']]}}
    """
    found: dict[str, dict[str, list[str]]] = {}
    for section, title, tags in [*(("training", group, [tags_of(group)]) for group in groups), *charts]:
        drawn = found.setdefault(section, {}).setdefault(title, [])
        drawn += [tag for tag in tags if tag not in drawn]
    return {
        section: {title: ["Multiline", tags] for title, tags in charts.items()} for section, charts in found.items()
    }


def group_of(tag: str) -> str:
    """What a tag shows, whatever the stage, and whether of a step or of an epoch.

    >>> [group_of(tag) for tag in ("loss/val", "val/loss", "val_loss", "train_loss_step", "speed")]
    ['loss', 'loss', 'loss', 'loss', 'speed']
    """
    first = re.sub(f"^{STAGE}[/_]", "", tag).partition("/")[0]
    return re.sub(f"(.)(_{STAGE})?(_step|_epoch)?$", r"\1", first)


def tags_of(group: str) -> str:
    """A regular expression of the tags of a group."""
    return f"^({STAGE}[/_])?{re.escape(group)}(_{STAGE})?(_step|_epoch)?(/|$)"


class Dashboard(Instrument):
    """TensorBoard's tab "Custom Scalars" shows the training on one page: losses and metrics, then what instruments measure.

    The curves are those that are logged. What differs in the stage only shares a chart: ``loss/train`` and ``loss/val``,
    ``train/loss`` and ``val/loss``, ``train_loss`` and ``val_loss``; else the group is what comes before the slash. The
    layout is written when training starts, and again after a validation or an epoch that logged something new: TensorBoard
    shows the newest, once its page is loaded again.

    Args:
        groups: prefixes of the tags to show, one chart each, in this order; None: what is logged.

    Raises:
        MisconfigurationException: no logger.

    >>> Dashboard(groups=["loss", "accuracy"]).groups
    ['loss', 'accuracy']
    """

    def __init__(self, *, groups: list[str] | None = None) -> None:
        super().__init__(every_n_steps=None, budget=None)
        self.groups = groups
        self.logged: set[str] = set()
        self.written: Layout = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.logged, self.written = set(), {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.look(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(trainer, pl_module)

    @guarded
    def look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout of what is logged by now, if it is another than before."""
        self.logged |= {group_of(tag) for tag in trainer.logged_metrics}  # on all ranks: it may add up over them
        groups = (
            sorted(self.logged, key=lambda group: ("loss" not in group, group)) if self.groups is None else self.groups
        )
        charts = [chart for each in instruments_of(callbacks_of(trainer)) for chart in each.charts()]
        found = layout(groups, charts)
        if found != self.written and trainer.is_global_zero and (writer := self.writer(trainer)) is not None:
            self.written = found
            writer.add_custom_scalars(found)


def instruments_of(callbacks: Iterable[Callback]) -> Iterator[Instrument]:
    """All instruments among some callbacks, those inside others included."""
    for each in callbacks:
        if isinstance(each, Instrument):
            yield each
        yield from instruments_of(getattr(each, "parts", ()))
