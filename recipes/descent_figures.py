"""What recipe ``descent`` draws and prints: the paths on a surface, and what a sweep of learning rates did."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from torchcalc.convergence import SURFACES
from torchcalc.instruments import animate_paths, contour_figure
from torchcalc.instruments.figures import COLOURS, INK, new_figure, quiet

# Paths of the first method, gradient descent, that a sweep's figure shows: those nearest to these parts of the limit.
SHOWN = (0.02, 0.5, 0.98, 1.02)


@dataclass
class Walk:
    """A method on its way down a surface."""

    surface: str
    method: str
    lr: float
    limit: float = 0  #: the largest stable lr as predicted, if the walk belongs to a sweep
    path: list[Tensor] = field(default_factory=list)

    @property
    def gaps(self) -> Tensor:
        """f(x) − f* along the path."""
        f = SURFACES[self.surface]
        return f(torch.stack(self.path)) - f(torch.tensor(f.minima).double()).min()

    @property
    def growth(self) -> float:
        """The factor by which the distance to the minimum of a quadratic shrinks or grows per step, in the end.

        From the largest gap, the square of a distance, in the last third of the walk and in the third before: a method
        with momentum oscillates.
        """
        third = max(1, len(self.path) // 3)
        return float((self.gaps[-third:].max() / self.gaps[-2 * third : -third].max()) ** (0.5 / third))

    @property
    def manner(self) -> str:
        """How gradient descent goes down the bowl, in words: across the valley at first, y being the steep direction."""
        y = torch.stack(self.path)[:, 1]
        if self.growth >= 1:
            return "diverges"
        if abs(y[1]) < 0.01 * abs(y[0]):
            return "stops in the valley, then walks"
        if (y[1:] * y[:-1] < 0).any():
            return "overshoots, and arrives"
        return "crawls" if self.growth > 0.99 else "walks"


def draw_paths(name: str, walks: Iterable[Walk], folder: Path, tensorboard: SummaryWriter, frames: int) -> None:
    """Draw the paths on a surface and animate them, into files and into TensorBoard."""
    f, paths = SURFACES[name], {walk.method: torch.stack(walk.path) for walk in walks}
    figure = contour_figure(f, f.bounds, paths, f.minima)
    figure.savefig(folder / f"{name}.png")
    tensorboard.add_figure(f"contours/{name}", figure)
    film = animate_paths(f, f.bounds, paths, folder / f"{name}.gif", f.minima, frames=frames)
    with Image.open(film) as picture:
        width, height = picture.size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=film.read_bytes())
    tensorboard._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=f"movies/{name}", image=image)]))


def sweep_table(sweep: Iterable[Walk]) -> str:
    """Each learning rate beside the largest stable one, what follows from it and what happened, in Markdown."""
    rows: list[tuple[str, ...]] = [("method", "lr", "limit", "lr / limit", "predicted", "seen", "distance per step")]
    for walk in sweep:
        rates = (f"{walk.lr:.4f}", f"{walk.limit:.4f}", f"{walk.lr / walk.limit:.2f}")
        verdicts = ("converges" if stable else "diverges" for stable in (walk.lr < walk.limit, walk.growth < 1))
        rows.append((walk.method, *rates, *verdicts, f"× {walk.growth:.3f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def sweep_figure(sweep: Sequence[Walk]) -> Figure:
    """Draw some of the first method's paths, and below how fast every method is at each learning rate."""
    figure, _ = new_figure(6.6, 6.2)
    figure.clear()
    f, first = SURFACES[sweep[0].surface], [walk for walk in sweep if walk.method == sweep[0].method]
    shown = {min(range(len(first)), key=lambda i: abs(first[i].lr / first[i].limit - part)) for part in SHOWN}
    grid = figure.add_gridspec(2, len(shown), height_ratios=(1, 1.3))
    for column, walk in enumerate(first[i] for i in sorted(shown)):
        ax = figure.add_subplot(grid[0, column])
        quiet(ax)
        contour_figure(f, f.bounds, {walk.method: torch.stack(walk.path)[:40]}, f.minima, labels=("", ""), ax=ax)
        if legend := ax.get_legend():
            legend.remove()
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{walk.method} at {walk.lr / walk.limit:.2f} × limit\n{walk.manner}", fontsize=9)
    ax = figure.add_subplot(grid[1, :])
    quiet(ax)
    ax.axhspan(1, 2, color="#F6E9E3", linewidth=0, zorder=0)
    for name, colour in zip(dict.fromkeys(walk.method for walk in sweep), COLOURS, strict=False):
        walks = sorted((walk for walk in sweep if walk.method == name), key=lambda walk: walk.lr)
        growths = [walk.growth for walk in walks]
        ax.plot([walk.lr for walk in walks], growths, "o-", color=colour, markersize=5, linewidth=1, label=name)
        ax.axvline(walks[0].limit, color=colour, linestyle="--", linewidth=1.2)
        ax.text(walks[0].limit * 1.01, 0.86, f"{walks[0].limit:.4g}", color=colour, fontsize=9)
    ax.set(xscale="log", ylim=(0.85, 1.25), xlabel="learning rate", ylabel="distance to the minimum, × per step")
    ax.text(0.005, 1.005, "diverges", color=INK, transform=ax.get_yaxis_transform(), fontsize=9)
    ax.legend(frameon=False, loc="upper left", fontsize=9)
    ax.set_title("What happened (dots), and the predicted limit (dashed)", fontsize=10)
    return figure
