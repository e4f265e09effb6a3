"""What the figures share: a canvas without pyplot's global state, one palette, and the way from a figure to pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["new_figure", "new_sheet", "pixels"]

#: Colours of Okabe and Ito 2008, which colour-blind people can tell apart, in an order that keeps neighbours distinct.
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#7F7F7F", "#6A3D9A"]
INK = "#333333"


def new_figure(
    width: float = 7.0,
    height: float = 4.5,
    *,
    rows: int = 1,
    columns: int = 1,
    margins: tuple[float, float, float, float] | None = None,
) -> tuple[Figure, Any]:
    """Return a figure of that many inches and its axes: one, or an array if there are several rows or columns.

    Args:
        margins: left, right, bottom and top in inches; None: found when it is drawn, which doubles the time to draw.

    Raises:
        ImportError: there is no matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'torchcalc[recipes]'") from error
    figure = Figure(figsize=(width, height), dpi=100, layout=None if margins else "constrained")
    FigureCanvasAgg(figure)
    if margins:
        left, right, bottom, top = margins
        sides = dict(left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height)
        figure.subplots_adjust(**sides)
    axes = figure.subplots(rows, columns)
    for ax in [axes] if rows == columns == 1 else axes.flat:
        quiet(ax)
    return figure, axes


def new_sheet(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure of that many inches and axes all over it, without frame and ticks, whose coordinates are inches.

    For pictures that are drawn while a training waits: ticks and titles of ordinary axes take most of the time there.
    """
    figure, ax = new_figure(width, height, margins=(0, 0, 0, 0))
    ax.set_axis_off()
    ax.set(xlim=(0, width), ylim=(0, height))
    return figure, ax


def write(ax: Axes, x: float, y: float, text: str, size: float = 10, **style: Any) -> None:
    """Write on a sheet, centred at a point unless ha= or va= say otherwise."""
    ax.text(x, y, text, fontsize=size, **({"ha": "center", "va": "center", "color": INK} | style))


def quiet(ax: Axes) -> None:
    """Draw the frame and the ticks thin and grey: the data are what matters."""
    for spine in ax.spines.values():
        spine.set(color="#BBBBBB", linewidth=0.8)
    ax.tick_params(color="#BBBBBB", labelcolor=INK, labelsize=10)
    ax.title.set(color=INK, fontsize=12)
    ax.xaxis.label.set(color=INK, fontsize=11)
    ax.yaxis.label.set(color=INK, fontsize=11)


def pixels(figure: Figure) -> Any:
    """Draw a figure and return it as a uint8 array, (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
