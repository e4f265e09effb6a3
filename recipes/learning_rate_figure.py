"""Curves, figure and table of the learning_rate recipe: what was predicted, what happened, and why where they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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


def write_curves(folder: str, runs: Sequence[Run], every: int) -> None:
    """Write loss and sharpness (of every so many steps): a TensorBoard run for each rate, so that they share a chart."""
    for run in runs:
        with SummaryWriter(f"{folder}/lr={short(run.lr)}") as writer:
            for step, loss in enumerate(run.losses):
                writer.add_scalar(
                    "sweep/loss_log10", math.log10(max(loss, FLOAT32)) if math.isfinite(loss) else loss, step
                )
            for i, sharpness in enumerate(run.sharpness):
                writer.add_scalar("sweep/sharpness", sharpness, i * every)


def sweep_figure(runs: Sequence[Run], found: RangeTest) -> Figure:
    """Draw all curves coloured by label, the sharpness on the way against the limit, and the table."""
    figure = Figure(figsize=(13, 7), dpi=100, layout="constrained")
    parts = figure.subplot_mosaic([["curves", "table"], ["edge", "table"]], width_ratios=(1.35, 1))
    for ax in parts.values():
        quiet(ax)
    draw_curves(parts["curves"], runs)
    draw_sharpness(parts["edge"], runs, found)
    draw_table(parts["table"], runs)
    return figure


def draw_curves(ax: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        ax.semilogy(run.losses, color=COLOURS[run.seen], lw=1.2)
    highest = max(value for run in runs for value in run.losses if math.isfinite(value))
    ax.set(xlabel="step", ylabel="loss", title="One net from one start at every learning rate")
    ax.set_ylim(top=min(100 * runs[0].losses[0], 1.2 * highest))
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
    ax.text(limit / 20, 30 * start, "here a step overshoots more every time", va="center")
    ax.axhline(start, color="black", lw=1, ls=":")
    ax.axvline(limit, ymax=0.85, color="black", lw=1, ls=":")
    ax.plot(found.interval, [start / 30] * 2, color="black", lw=2)
    ax.plot(found.suggestion, start / 30, "o", color="black", ms=6)
    ax.text(0.9 * found.interval[0], start / 30, "range test", ha="right", va="center")
    ax.set(xlabel="learning rate", ylabel="sharpness λ", ylim=(start / 50, 50 * start))
    ax.set_title("Sharpness on the way (dot: at the end) and the stability limit")


def draw_table(ax: Axes, runs: Sequence[Run]) -> None:
    ax.set_axis_off()
    wrong = [run for run in runs if run.reason]
    size = min(9.5, 250 / (len(runs) + len(wrong)))
    lines = len(runs) + len(wrong) + 3

    def write(line: int, cells: Sequence[str], colour: str = "black", **style: Any) -> None:
        for x, cell in zip((0.0, 0.16, 0.33, 0.55, 0.78), cells, strict=False):
            ax.text(
                x, 1 - line / lines, cell, color=colour, fontsize=size, transform=ax.transAxes, va="center", **style
            )

    write(0, (*HEAD[:4], "agrees"), weight="bold")
    for line, run in enumerate(runs, 1):
        cells = (short(run.lr), short(run.lr / run.limit), run.predicted, run.seen, "no" if run.reason else "yes")
        write(line, cells, COLOURS[run.seen], weight="bold" if run.reason else "normal")
    for line, run in enumerate(wrong, len(runs) + 2):
        write(line, (f"{short(run.lr)}: {run.reason}",), COLOURS[run.seen])
