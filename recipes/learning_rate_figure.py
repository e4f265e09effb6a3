"""Curves, figure and table of the learning_rate recipe: what was predicted, what happened, and why where they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from recipes.depth_figure import FLOAT32
from torchcalc.convergence import RangeTest, predict, verdict
from torchcalc.instruments.figures import quiet

COLOURS = {"crawls": "#E69F00", "converges": "#009E73", "oscillates": "#0072B2", "diverges": "#D55E00"}
HEAD = ("lr", "lr / limit", "predicted", "seen", "why not as predicted")


@dataclass
class Run:
    """A net that is trained with one learning rate."""

    lr: float
    limit: float = math.nan  #: the largest stable learning rate at the start
    slope: float = math.nan  #: part of the loss by which a step of lr 1 lets it fall at the start
    sharpness: list[float] = field(default_factory=list)  #: λ on the way
    vector: dict[str, Tensor] | None = None  #: its direction, where it was measured last
    losses: list[float] = field(default_factory=list)

    @cached_property
    def predicted(self) -> str:
        """Crawls, if the slope at the start, kept up to the end, would not halve the loss; otherwise what λ says."""
        if self.lr < self.limit and self.promised < 0.5:
            return "crawls"
        return predict(self.lr, self.limit, len(self.losses)).label

    @cached_property
    def seen(self) -> str:
        return verdict(self.losses, window=1).label

    @property
    def promised(self) -> float:
        """The part of the loss by which the slope at the start lets it fall: lr·‖∇L‖² a step (more with momentum)."""
        return self.lr * len(self.losses) * self.slope

    @property
    def reason(self) -> str:
        """Why the prediction failed, if it did. The limit is proportional to 1/λ."""
        if self.predicted == self.seen:
            return ""
        known = [value for value in self.sharpness if math.isfinite(value)]
        first, last, most, stable = known[0], known[-1], max(known), known[0] * self.limit / self.lr
        if most > stable and self.predicted != "diverges":
            return f"λ grew from {first:.2g} to {most:.2g}; stable up to {stable:.2g}"
        if "crawls" in (self.predicted, self.seen):
            return f"the slope changed: at the start it promised a fall by {self.promised:.0%}"
        if self.predicted == "oscillates":
            return f"the overshoots, by {2 * self.lr / self.limit - 1:.0%} of the error a step, die out"
        if last < stable < first:
            return f"λ fell from {first:.2g} to {last:.2g}; stable up to {stable:.2g}"
        return f"λ stays at {last:.2g}, stable up to {stable:.2g}, but far from a minimum the loss is no parabola"


def short(value: float) -> str:
    """Two digits, never as a power of ten."""
    return f"{float(f'{value:.2g}'):g}"


def sweep_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    return [(short(r.lr), short(r.lr / r.limit), r.predicted, r.seen, r.reason) for r in runs]


def sweep_table(runs: Sequence[Run]) -> str:
    """Return the table as text."""
    lines = [HEAD, *sweep_rows(runs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def sweep_markdown(runs: Sequence[Run]) -> str:
    """Return the table as TensorBoard shows text."""
    lines = [HEAD, ("---",) * len(HEAD), *sweep_rows(runs)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_curves(folder: str, runs: Sequence[Run], every: int) -> None:
    """Write loss and sharpness (of every so many steps): a TensorBoard run for each rate, so that they share a chart."""
    for run in runs:
        with SummaryWriter(
            f"{folder}/lr={short(run.lr)}", purge_step=0
        ) as writer:  # a resumed run has written them before
            for step, loss in enumerate(run.losses):
                writer.add_scalar(
                    "sweep/loss_log10", math.log10(max(loss, FLOAT32)) if math.isfinite(loss) else loss, step
                )
            for i, sharpness in enumerate(run.sharpness):
                writer.add_scalar("sweep/sharpness", sharpness, i * every)


def sweep_figures(runs: Sequence[Run], found: RangeTest) -> dict[str, Figure]:
    """All curves coloured by label, and the sharpness on the way against the limit; in a size whose text a card shows."""
    figures = {}
    for name in ("learning_rate", "sharpness"):
        figures[name] = figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
        ax = figure.subplots()
        quiet(ax)
        draw_curves(ax, runs) if name == "learning_rate" else draw_sharpness(ax, runs, found)
    return figures


def draw_curves(ax: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        ax.semilogy(run.losses, color=COLOURS[run.seen], lw=1.2)
    highest = max(value for run in runs for value in run.losses if math.isfinite(value))
    ax.set(xlabel="step", ylabel="loss", title="One net, every learning rate")
    lowest = min(value for run in runs for value in run.losses)
    ax.set_ylim(bottom=lowest / 30, top=min(100 * runs[0].losses[0], 1.2 * highest))  # with room for the legend
    handles = [Line2D([], [], color=colour, lw=2.5, label=label) for label, colour in COLOURS.items()]
    ax.legend(handles=handles, loc="lower left", ncols=2, frameon=False)


def draw_sharpness(ax: Axes, runs: Sequence[Run], found: RangeTest) -> None:
    start, limit = runs[0].sharpness[0], runs[0].limit
    for run in runs:
        values = [value for value in run.sharpness if math.isfinite(value) and value > 0]
        ax.loglog(
            [run.lr] * 2, [min(values), max(values)], color=COLOURS[run.seen], lw=5, alpha=0.45, solid_capstyle="round"
        )
        ax.loglog(run.lr, values[-1], "o", color=COLOURS[run.seen], ms=4)
    ends = [runs[0].lr, runs[-1].lr]
    edge = [start * limit / lr for lr in ends]
    ax.fill_between(ends, edge, [1e9 * start] * 2, color="black", alpha=0.06, lw=0)
    ax.loglog(ends, edge, color="black", lw=1)
    ax.text(ends[1], 25 * start, "here steps overshoot more every time", ha="right", va="center")
    ax.axhline(start, color="black", lw=1, ls=":")
    ax.axvline(limit, ymax=0.85, color="black", lw=1, ls=":")
    ax.plot(found.interval, [start / 30] * 2, color="black", lw=2)
    ax.plot(found.suggestion, start / 30, "o", color="black", ms=6)
    ax.text(0.9 * found.interval[0], start / 30, "range test", ha="right", va="center")
    ax.set(xlabel="learning rate", ylabel="sharpness λ", ylim=(start / 50, 50 * start))
    ax.set_title("Sharpness (dot: at the end) and stability limit")
