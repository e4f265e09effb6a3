"""Numbers per layer over time, as a heat map: depth downwards, time to the right, the colour logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from torchcalc.instruments.figures import new_sheet, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DepthHistory"]


class DepthHistory:
    """A table of positive numbers, a row per layer and a column per measured step, that draws itself.

    Args:
        columns: at most so many columns are kept, >= 2: when they are full every second one is dropped, and from then on
            only every second new one is taken. The picture spans the whole training at any length.

    Raises:
        ValueError: columns < 2.

    >>> history = DepthHistory()
    >>> for step in range(3):
    ...     history.add(step, {"first": 1e-3, "last": 0.5})
    >>> history.steps, history.layers
    ([0, 1, 2], ['first', 'last'])
    >>> figure = history.figure("gradient norm")
    """

    def __init__(self, columns: int = 400) -> None:
        if columns < 2:
            raise ValueError(f"columns={columns}: must be at least 2")
        self.columns = columns
        self.layers: list[str] = []
        self.steps: list[int] = []
        self.values: list[list[float]] = []  # a column per step; shorter than layers where a layer came later
        self.stride, self.seen = 1, 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a column; or, at the step that was added last, more layers of the same column."""
        if new := [layer for layer in values if layer not in self.layers]:
            self.layers += new
        if not self.steps or step != self.steps[-1]:
            self.seen += 1
            if (self.seen - 1) % self.stride:
                return
            if len(self.steps) == self.columns:
                self.steps, self.values, self.stride = self.steps[::2], self.values[::2], self.stride * 2
                if (self.seen - 1) % self.stride:
                    return
            self.steps.append(step)
            self.values.append([])
        column = self.values[-1]
        column += [math.nan] * (len(self.layers) - len(column))
        for i, layer in enumerate(self.layers):
            column[i] = values.get(layer, column[i])

    def figure(self, title: str, *, centre: float | None = None) -> Figure:
        """Draw the table.

        Args:
            title: above the picture.
            centre: a value that is as it should be: it is drawn white, larger ones red, smaller ones blue.

        Returns:
            The figure: grey where nothing was measured (a layer frozen for a time) or nan, black for zero, magenta for
            infinity, as it says where there are such. Layers that were never measured are left out.

        Raises:
            ValueError: nothing has been added.
            ImportError: there is no matplotlib.
        """
        if not self.steps:
            raise ValueError("the history is empty: add(step, {layer: value}) first")
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        table = torch.full((len(self.layers), len(self.steps)), math.nan, dtype=torch.float64, device="cpu")
        for i, column in enumerate(self.values):
            table[: len(column), i] = torch.tensor(column, dtype=torch.float64, device="cpu")
        rows = [i for i, row in enumerate(table) if not row.isnan().all()]
        layers, table = [self.layers[i] for i in rows] or [""], table[rows or [0]]
        logs = table.log10()  # drawn on a linear scale: exponents neither under- nor overflow
        known = logs[logs.isfinite()]
        low, high = (float(known.min()), float(known.max())) if len(known) else (-1.0, 0.0)
        if centre is not None:
            reach = max(math.log10(centre) - low, high - math.log10(centre), 1.0)
            low, high = math.log10(centre) - reach, math.log10(centre) + reach
        elif high - low < 1:
            low, high = (low + high - 1) / 2, (low + high + 1) / 2
        colours = colormaps["viridis" if centre is None else "RdBu_r"]
        colours = colours.with_extremes(under="black", over="#FF00FF", bad="#D5D5D5")
        names = _short(layers)
        width, height = 8.0, 4.5
        size = 10 if len(names) <= 20 else 8
        left, right, bottom, top = 0.2 + 0.0085 * size * max(map(len, names)), width - 1.0, 0.6, height - 0.4
        figure, ax = new_sheet(width, height)
        edges = _edges(self.steps)
        x = [left + (right - left) * (edge - edges[0]) / (edges[-1] - edges[0]) for edge in edges]
        y = torch.linspace(top, bottom, len(layers) + 1, device="cpu").numpy()
        shown = logs.clamp(low - 1, high + 1).numpy()  # zero and infinity: beyond the scale, where their colours are
        mesh: dict[str, Any] = dict(cmap=colours, vmin=low, vmax=high)
        ax.add_patch(Rectangle((left, bottom), right - left, top - bottom, color="#D5D5D5", linewidth=0))
        ax.pcolormesh(x, y, shown, **mesh)
        ramp = torch.linspace(low, high, 256, device="cpu")[:, None].numpy()
        ax.pcolormesh((right + 0.15, right + 0.3), torch.linspace(bottom, top, 257, device="cpu").numpy(), ramp, **mesh)
        ax.set(xlim=(0, width), ylim=(0, height))
        write(ax, (left + right) / 2, height - 0.2, title, 12)
        write(ax, (left + right) / 2, 0.15, "step", 11)
        kinds = (
            ("infinite", "#FF00FF", table.isinf()),
            ("zero", "black", table == 0),
            ("not measured", "#D5D5D5", table.isnan()),
        )
        at = width - 0.1
        for words, colour, there in kinds:
            if there.any():
                write(ax, at, 0.15, words, ha="right")
                at -= 0.2 + 0.08 * len(words)
                ax.add_patch(Rectangle((at, 0.1), 0.1, 0.1, color=colour, linewidth=0))
                at -= 0.15
        for step in MaxNLocator(5, integer=True).tick_values(self.steps[0], self.steps[-1]):
            if edges[0] <= step <= edges[-1]:
                at = left + (right - left) * (step - edges[0]) / (edges[-1] - edges[0])
                write(ax, at, bottom - 0.14, f"{step:.0f}")
        for i in range(0, len(names), max(1, math.ceil(len(names) / 28))):
            write(ax, left - 0.08, top - (top - bottom) * (i + 0.5) / len(names), names[i], size, ha="right")
        for n in range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5))):
            at = bottom + (top - bottom) * (n - low) / (high - low)
            write(ax, right + 0.38, at, _power(n), ha="left")
        return figure

    def state_dict(self) -> dict[str, Any]:
        """Return everything in numbers, strings and a tensor, for a checkpoint."""
        width = len(self.layers)
        table = torch.tensor([column + [math.nan] * (width - len(column)) for column in self.values], device="cpu")
        return {"layers": [*self.layers], "steps": [*self.steps], "values": table, "at": [self.stride, self.seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another history was."""
        self.layers, self.steps, self.values = [*state["layers"]], [*state["steps"]], state["values"].tolist()
        self.stride, self.seen = state["at"]


def _edges(steps: Sequence[int]) -> list[float]:
    """The borders of columns measured at these steps: half-way between, and as far beyond the first and the last."""
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    first, last = (middles[0] - steps[0], steps[-1] - middles[-1]) if middles else (0.5, 0.5)
    return [steps[0] - first, *middles, steps[-1] + last]


def _power(exponent: int) -> str:
    """10⁻³, in characters that need no mathematical typesetting, which is slow."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _short(names: Sequence[str], width: int = 28) -> list[str]:
    """Names that fit: without the path that all share, words cut to a letter from the left, then cut in the middle."""
    paths = [name.split(".") for name in names]
    if max(map(len, names)) > width:
        while min(map(len, paths)) > 1 and len({path[0] for path in paths}) == 1:
            paths = [path[1:] for path in paths]
    return [_cut(path, width) for path in paths]


def _cut(path: list[str], width: int) -> str:
    for i, word in enumerate(path[:-1]):
        if len(".".join(path)) > width and not word.isdigit():
            path = [*path[:i], word[:1], *path[i + 1 :]]
    name = ".".join(path)
    return name if len(name) <= width else f"{name[: width // 2]}…{name[1 - width // 2 :]}"
