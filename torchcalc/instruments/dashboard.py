"""The dashboard: a layout for TensorBoard's tab "Custom Scalars", made from what is logged and from the instruments there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lightning.pytorch import Callback, LightningModule, Trainer

from torchcalc.instruments.instrument import Chart, Instrument, callbacks_of

__all__ = ["Dashboard", "layout"]

Layout = dict[str, dict[str, list[object]]]


def layout(groups: Iterable[str], charts: Iterable[Chart] = ()) -> Layout:
    """Return a layout for ``writer.add_custom_scalars``.

    Args:
        groups: prefixes of tags that belong into one chart: "loss" for ``loss/train`` and ``loss/val``.
        charts: section, title and regular expressions of tags, of further charts. Charts of the same section and title
            become one.

    Returns:
        Sections, the training's own first, to charts, to what is drawn in them.

    >>> layout(["loss"], [("sharpness", "learning rate", ["^lr$"])])
    {'training': {'loss': ['Multiline', ['^loss(/|$)']]}, 'sharpness': {'learning rate': ['Multiline', ['^lr$']]}}
    """
    found: dict[str, dict[str, list[str]]] = {}
    for section, title, tags in [*(("training", group, [f"^{re.escape(group)}(/|$)"]) for group in groups), *charts]:
        drawn = found.setdefault(section, {}).setdefault(title, [])
        drawn += [tag for tag in tags if tag not in drawn]
    return {
        section: {title: ["Multiline", tags] for title, tags in charts.items()} for section, charts in found.items()
    }


class Dashboard(Instrument):
    """TensorBoard's tab "Custom Scalars" shows the training on one page: losses and metrics, then what instruments measure.

    The curves are those that are logged, grouped by what comes before the slash: ``loss/train`` and ``loss/val`` share a
    chart. TensorBoard takes one layout per run, so it is written once: after the sanity check, if that logs anything, else
    after the first epoch.

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
        self.logged: list[str] = []
        self.written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.logged, self.written = list(self.groups or []), False

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what validation logs."""
        self.look(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout, if it is known already."""
        super().on_train_start(trainer, pl_module)
        self.write(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout, now that one epoch has logged."""
        if not self.written:
            self.look(trainer)
            self.write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There is nothing to draw."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the layout of a training of one epoch, or less."""
        if not self.written:
            self.look(trainer)
            self.write(trainer, anyway=True)

    def look(self, trainer: Trainer) -> None:
        """Note the groups of what has been logged, losses first."""
        if self.groups is None:
            tags = [tag.partition("/")[0] for tag in trainer.callback_metrics]
            self.logged = sorted({*tags, *self.logged}, key=lambda tag: ("loss" not in tag, tag))

    def write(self, trainer: Trainer, anyway: bool = False) -> None:
        known = self.groups is not None or bool(self.logged)
        if self.written or not (known or anyway) or not trainer.is_global_zero:
            return
        if (writer := self.writer(trainer)) is not None:
            charts = [chart for each in instruments_of(callbacks_of(trainer)) for chart in each.charts()]
            if found := layout(self.logged, charts):
                writer.add_custom_scalars(found)
        self.written = True


def instruments_of(callbacks: Iterable[Callback]) -> Iterator[Instrument]:
    """All instruments among some callbacks, those inside others included."""
    for each in callbacks:
        if isinstance(each, Instrument):
            yield each
        yield from instruments_of(getattr(each, "parts", ()))
