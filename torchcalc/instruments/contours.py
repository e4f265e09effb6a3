"""Paths of optimizers on a function of two variables: as a figure of its contours, and as an animation.

The contours are spaced evenly in log(f − f_min): a valley that is a thousand times flatter than its walls, as
Rosenbrock's, still shows where it leads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchcalc.instruments.figures import COLOURS, INK, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["animate_paths", "contour_figure"]

Bounds = tuple[float, float, float, float]
FAR = 100.0  # a path that is this many times the picture's size away is cut: it will not be seen again


def contour_figure(
    f: Callable[[Tensor], Tensor],
    bounds: Bounds,
    paths: Mapping[str, Tensor] | None = None,
    minima: Iterable[tuple[float, float]] = (),
    *,
    title: str | None = None,
    labels: tuple[str, str] = ("x", "y"),
    resolution: int = 201,
    levels: int = 20,
    ax: Axes | None = None,
) -> Figure:
    """Draw the contours of f, evenly spaced in the logarithm, and the paths on them.

    Args:
        f: maps points of shape (..., 2) to values of shape (...).
        bounds: (x0, x1, y0, y1) of the picture; a path is cut where it goes far out of it, or becomes inf or nan.
        paths: by name, the points visited, of shape (n, 2), n >= 1. A ring marks the first, a dot the last.
        minima: points that get a star.
        title: above the picture; None: the name of f, if it has one.
        labels: of the two axes.
        resolution: points along each axis at which f is evaluated, >= 2.
        levels: number of contours, >= 2.
        ax: axes of a figure of yours to draw on; by default on a new one of 7 by 5.5 inches.

    Returns:
        The figure, for ``figure.savefig(...)`` or ``writer.add_figure(...)``.

    Raises:
        ValueError: bounds, paths or numbers out of range; f returns another shape or nothing finite.
        ImportError: there is no matplotlib.

    >>> path = torch.tensor([[1.5, 1.0], [0.3, 0.2]])
    >>> figure = contour_figure(lambda p: p.pow(2).sum(-1), (-2, 2, -2, 2), {"descent": path}, [(0, 0)])
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['descent', 'minimum']
    """
    found = _check_paths(paths or {}, bounds)
    values = _evaluate(f, bounds, resolution)
    if ax is None:
        _, ax = new_figure(7, 5.5)
    draw_surface(ax, values, bounds, minima, _name(f) if title is None else title, labels, levels)
    for name, colour, points in found:
        draw_trail(ax, name, colour, points)
    _legend(ax)
    return ax.figure  # type: ignore[return-value]


def animate_paths(
    f: Callable[[Tensor], Tensor],
    bounds: Bounds,
    paths: Mapping[str, Tensor],
    path: str | Path,
    minima: Iterable[tuple[float, float]] = (),
    *,
    title: str | None = None,
    labels: tuple[str, str] = ("x", "y"),
    resolution: int = 201,
    levels: int = 20,
    frames: int = 60,
    frames_per_second: int = 12,
    width: float = 6.0,
    dpi: int = 72,
) -> Path:
    """Write the paths, walking step by step over the contours of f, to an animated GIF, by matplotlib's Pillow writer.

    Args:
        f, bounds, paths, minima, title, labels, resolution, levels: as for :func:`contour_figure`; at least one path.
            All walk at the same pace: a frame shows every path at the same step.
        path: the file, ``*.gif``; its folder is made.
        frames: at most so many, >= 1, spread evenly over the steps of the longest path, the first and the last included.
            The last one is shown for two seconds.
        frames_per_second: at least 1.
        width: of the picture in inches.
        dpi: pixels per inch; 6 inches at 72 with 60 frames make some 500 kB.

    Returns:
        The file's path.

    Raises:
        ValueError: as :func:`contour_figure`, or no path, or a file name that does not end in .gif.
        ImportError: there is no matplotlib or no Pillow.

    >>> walk = torch.linspace(1, 0, 5)[:, None] * torch.tensor([1.5, 1.0])
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = animate_paths(lambda p: p.pow(2).sum(-1), (-2, 2, -2, 2), {"descent": walk}, f"{folder}/walk.gif")
    ...     file.name
    'walk.gif'
    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise ValueError(f"path={str(path)!r}: the animation is a GIF: name it {path.with_suffix('.gif').name!r}")
    for name, number in (("frames", frames), ("frames_per_second", frames_per_second), ("dpi", dpi)):
        if number < 1:
            raise ValueError(f"{name}={number}: must be at least 1")
    found = _check_paths(paths, bounds)
    if not found:
        raise ValueError(
            "paths is empty: there is nothing to animate; give at least one {name: tensor of shape (n, 2)}"
        )
    values = _evaluate(f, bounds, resolution)
    figure, ax = new_figure(width, width * 0.8)
    figure.set_dpi(dpi)
    from matplotlib.animation import PillowWriter

    draw_surface(ax, values, bounds, minima, _name(f) if title is None else title, labels, levels)
    trails = [_Trail(ax, *each) for each in found]
    _legend(ax)
    counter = ax.text(0.99, 0.01, "", transform=ax.transAxes, ha="right", va="bottom", color=INK, fontsize=9)
    last = max(len(paths[name]) for name, *_ in found) - 1
    shown = torch.linspace(0, last, min(frames, last + 1), device="cpu").round().int().tolist()
    if shown[-1] != last:  # a single frame
        shown = [last]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = PillowWriter(fps=frames_per_second)
    with writer.saving(figure, str(path), dpi):
        figure.canvas.draw()
        figure.set_layout_engine("none")  # where the axes are has been found; finding it again costs most of a frame
        for step in shown + [last] * (2 * frames_per_second):
            for trail in trails:
                trail.show(step + 1)
            counter.set_text(f"step {step}")
            writer.grab_frame()
    return path


def draw_trail(ax: Axes, name: str, colour: str, points: Tensor) -> None:
    """A whole path: a ring at its first point, a dot at its last."""
    _Trail(ax, name, colour, points).show(len(points))


class _Trail:
    """One path on some axes, drawn up to a step."""

    def __init__(self, ax: Axes, name: str, colour: str, points: Tensor) -> None:
        self.points = points
        dotted: dict[str, Any] = dict(marker=".", markersize=5) if len(points) <= 60 else {}
        style: dict[str, Any] = dict(color=colour, linewidth=1.6, solid_capstyle="round", alpha=0.9, zorder=3)
        (self.line,) = ax.plot([], [], label=name, **style, **dotted)
        ax.plot(*points[:1].T.tolist(), "o", markersize=7, markerfacecolor="white", markeredgecolor=colour, zorder=4)
        (self.head,) = ax.plot([], [], "o", markersize=6, color=colour, markeredgecolor="white", zorder=5)

    def show(self, count: int) -> None:
        x, y = self.points[:count].T.tolist()
        self.line.set_data(x, y)
        self.head.set_data(x[-1:], y[-1:])


def _check_paths(paths: Mapping[str, Tensor], bounds: Bounds) -> list[tuple[str, str, Tensor]]:
    """Name, colour and points of each path, in float64 on the CPU, cut where it leaves the picture for good."""
    x0, x1, y0, y1 = bounds
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"bounds={bounds}: must be (x0, x1, y0, y1) with x0 < x1 and y0 < y1")
    centre = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2], dtype=torch.float64, device="cpu")
    size = torch.tensor([x1 - x0, y1 - y0], dtype=torch.float64, device="cpu")
    found = []
    for i, (name, points) in enumerate(paths.items()):
        if points.dim() != 2 or points.shape[1] != 2 or not len(points):
            raise ValueError(f"paths[{name!r}] has shape {tuple(points.shape)}: must be (n, 2) with n >= 1")
        points = points.detach().to("cpu", torch.float64)
        distance = ((points - centre) / size).abs().amax(1)
        if not distance[0] < FAR:
            raise ValueError(f"paths[{name!r}] starts at {tuple(points[0].tolist())}, far out of bounds={bounds}")
        if not (near := distance < FAR).all():
            cut = int(near.logical_not().int().argmax())
            points, gone = points[:cut], points[cut]
            if gone.isfinite().all():  # the line still shows where it went
                step = gone - points[-1]
                points = torch.cat([points, (points[-1] + step * (FAR / (step / size).abs().max()))[None]])
        found.append((name, COLOURS[i % len(COLOURS)], points))
    return found


def _evaluate(f: Callable[[Tensor], Tensor], bounds: Bounds, resolution: int) -> Tensor:
    """The values of f on a grid, rows along y, columns along x."""
    if resolution < 2:
        raise ValueError(f"resolution={resolution}: must be at least 2 points along each axis")
    x0, x1, y0, y1 = bounds
    y, x = (torch.linspace(a, b, resolution, dtype=torch.float64, device="cpu") for a, b in ((y0, y1), (x0, x1)))
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    with torch.no_grad():
        values = f(points)
    if values.shape != points.shape[:-1]:
        raise ValueError(
            f"f maps shape {tuple(points.shape)} to {tuple(values.shape)}: must be {(*points.shape[:-1],)}"
        )
    if not values.isfinite().any():
        raise ValueError(f"f is finite nowhere in bounds={bounds}")
    return values.double().cpu()


def draw_surface(
    ax: Axes,
    values: Tensor,
    bounds: Bounds,
    minima: Iterable[tuple[float, float]],
    title: str,
    labels: tuple[str, str],
    levels: int,
    *,
    lowest: float = 1e-6,
    values_shown: bool = False,
) -> None:
    """Contours of a grid of values, rows along y.

    The lowest lies at that share of the picture's height above its bottom; with values_shown some say what f is there.
    """
    if levels < 2:
        raise ValueError(f"levels={levels}: must be at least 2")
    x0, x1, y0, y1 = bounds
    height, width = values.shape
    ax.set(xlim=(x0, x1), ylim=(y0, y1), xlabel=labels[0], ylabel=labels[1], title=title)
    finite = values[values.isfinite()]
    if not len(finite):
        ax.text((x0 + x1) / 2, (y0 + y1) / 2, "finite nowhere", ha="center", color=INK)
        return
    above = values - finite.min()
    top = (finite.max() - finite.min()).clamp_min(torch.finfo(torch.float64).tiny)
    # ... or higher, if less than a five-hundredth of the picture lies below it.
    bottom = torch.maximum(top * lowest, (finite - finite.min()).quantile(0.002)).clamp(max=top / 2)
    logs = (above.clamp_min(bottom) / bottom).log10()
    columns, rows = (torch.linspace(a, b, n, device="cpu").numpy() for a, b, n in ((x0, x1, width), (y0, y1, height)))
    grid = columns, rows, logs.numpy()
    heights = torch.linspace(0, float((top / bottom).log10()), levels, device="cpu").tolist()
    shades = [str(0.99 - 0.34 * i / (levels - 1)) for i in range(levels)]  # greys: the colours belong to the paths
    ax.contourf(*grid, levels=heights, colors=shades, extend="max", zorder=0)
    lines = ax.contour(*grid, levels=heights, colors="white", linewidths=0.6, zorder=1)
    if values_shown:
        base, unit = float(finite.min()), float(bottom)
        text = ax.clabel(lines, heights[1::3], fontsize=7, colors=INK, fmt=lambda h: f"{base + unit * 10**h:.3g}")
        for each in text:
            each.set_zorder(2)
    for i, (x, y) in enumerate(minima):
        style: dict[str, Any] = dict(color="#FFD700", markeredgecolor=INK, markeredgewidth=0.7, zorder=6)
        ax.plot(x, y, "*", markersize=13, label=None if i else "minimum", linestyle="none", **style)


def _name(f: Callable[[Tensor], Tensor]) -> str:
    name = str(getattr(f, "name", getattr(f, "__name__", "")))  # a Surface has the former, a function the latter
    return "" if name == "<lambda>" else name


def _legend(ax: Axes) -> None:
    """Below the picture, where it hides nothing."""
    if handles := ax.get_legend_handles_labels()[0]:
        handles.sort(key=lambda handle: handle.get_label() == "minimum")
        style: dict[str, Any] = dict(fontsize=8, frameon=False, ncols=min(len(handles), 5), columnspacing=1.2)
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.09), **style)
