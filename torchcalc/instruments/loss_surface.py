"""The loss over a line or a plane in the space of all weights.

Plane.  The path of a training, w₁ … w_n, lies in a space of millions of dimensions, but mostly along few of them. With the
rows xᵢ = wᵢ − w_n of X and the eigenvectors uⱼ of XXᵀ, which is only n × n,

    XXᵀ·uⱼ = σⱼ²·uⱼ,    dⱼ = Xᵀuⱼ/σⱼ                                             (1)

are the principal directions, orthonormal, and xᵢ has the coordinates xᵢ·dⱼ. The plane through w_n along d₁ and d₂ holds the
share (σ₁² + σ₂²)/Σσ² of the squared distances; what it shows is the loss on the plane, and the path's shadow on it.

References: Goodfellow, Vinyals, Saxe 2015, arXiv:1412.6544 (slices); Li et al. 2018, arXiv:1712.09913 (planes by PCA).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchcalc.instruments.contours import draw_surface, draw_trail
from torchcalc.instruments.figures import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LossPlane", "LossSlice", "loss_plane", "loss_slice"]

Parameters = Mapping[str, Tensor]
Loss = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class LossSlice:
    """The loss on the line start + t·(end − start).

    Attributes:
        t: float64, (n,).
        losses: float64, (n,).

    >>> line = LossSlice(torch.tensor([0.0, 1.0]), torch.tensor([4.0, 1.0]))
    >>> line.figure().axes[0].get_ylabel()
    'loss'
    """

    t: Tensor
    losses: Tensor

    def figure(self, *, title: str = "the loss from the first to the last weights") -> Figure:
        """Draw the curve; a ring marks the start, a dot the end."""
        figure, ax = new_figure(7, 4)
        ax.plot(self.t.numpy(), self.losses.numpy(), color=COLOURS[1], linewidth=1.8)
        for at, style in ((0.0, dict(markerfacecolor="white")), (1.0, {})):
            i = int((self.t - at).abs().argmin())
            ax.plot(self.t[i], self.losses[i], "o", color=COLOURS[1], markersize=7, **style)
        finite = self.losses[self.losses.isfinite()]
        if len(finite) and finite.min() > 0 and finite.max() > 50 * finite.min():
            ax.set_yscale("log")
        ax.set(xlabel="0: first weights, 1: last weights", ylabel="loss", title=title)
        ax.grid(color="#EEEEEE")
        return figure


@dataclass(frozen=True)
class LossPlane:
    """The loss on a plane through a path's last point.

    Attributes:
        x, y: float64, (n,): coordinates along the two directions, in units of the weights.
        losses: float64, (n, n): rows along y, columns along x.
        path: float64, (m, 2): the path's coordinates; the last is (0, 0).
        shares: of the path's squared distances from its last point that lie along either direction.

    >>> path = [{"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}, {"w": torch.zeros(2)}]
    >>> loss_plane(lambda p: p["w"].square().sum(), path, resolution=3).figure().axes[0].get_title()
    'the loss on the plane of the path'
    """

    x: Tensor
    y: Tensor
    losses: Tensor
    path: Tensor
    shares: tuple[float, float]

    def figure(self, *, title: str = "the loss on the plane of the path") -> Figure:
        """Draw the contours, evenly spaced in the logarithm of the loss above its lowest, and the path.

        Between the points evaluated the loss is interpolated; where it is not finite the picture is white.
        """
        figure, ax = new_figure(7, 5.5)
        bounds = (float(self.x[0]), float(self.x[-1]), float(self.y[0]), float(self.y[-1]))
        labels = (f"direction 1: {self.shares[0]:.0%} of the path", f"direction 2: {self.shares[1]:.0%}")
        losses = self.losses
        if losses.isfinite().all():  # smooth contours between few points
            wide = torch.nn.functional.interpolate(
                losses[None, None], size=(121, 121), mode="bicubic", align_corners=True
            )
            losses = wide[0, 0]
        draw_surface(ax, losses, bounds, (), title, labels, 16, lowest=3e-3, values_shown=True)
        draw_trail(ax, "training", COLOURS[0], self.path)
        return figure


def loss_slice(
    loss: Loss, start: Parameters, end: Parameters, *, low: float = -0.25, high: float = 1.25, points: int = 43
) -> LossSlice:
    """Evaluate the loss on the line through two sets of weights.

    Args:
        loss: from a dict of parameters to a scalar, such as :func:`torchcalc.calculus.training_loss`.
        start, end: dicts of parameters of the same names and shapes, for t = 0 and t = 1.
        low, high: range of t, low < high.
        points: evaluations, >= 2; of the default range 6k + 1 hold both 0 and 1.

    Raises:
        ValueError: an argument out of range, or start and end differ in names or shapes.

    >>> line = loss_slice(lambda p: p["w"] ** 2, {"w": torch.tensor(2.0)}, {"w": torch.tensor(0.0)}, low=0, high=1, points=3)
    >>> line.losses.tolist()
    [4.0, 1.0, 0.0]
    """
    if not low < high or points < 2:
        raise ValueError(f"low={low}, high={high}, points={points}: must be low < high and at least 2 points")
    _check_same([start, end])
    t = torch.linspace(low, high, points, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        losses = [loss({k: torch.lerp(start[k], end[k], x) for k in start}) for x in t.tolist()]
    return LossSlice(t, torch.stack([each.detach().double().cpu() for each in losses]))


def loss_plane(
    loss: Loss,
    path: Sequence[Parameters],
    *,
    resolution: int = 21,
    margin: float = 0.25,
    device: torch.device | None = None,
) -> LossPlane:
    """Evaluate the loss on the plane that holds most of a path through the space of weights (1).

    Args:
        loss: from a dict of parameters to a scalar, such as :func:`torchcalc.calculus.training_loss`.
        path: dicts of parameters of the same names and shapes, at least two, in order of time. They may lie on the CPU.
        resolution: evaluations along each direction, >= 2: the price is its square.
        margin: how far the plane reaches beyond the path, as a share of the path's extent, > 0.
        device: where the loss is evaluated; by default where the path lies.

    Raises:
        ValueError: an argument out of range; a path that does not move, or not within finite numbers, or whose points differ
            in names or shapes.

    >>> path = [{"w": torch.tensor([3.0, 1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0, 0.0])}, {"w": torch.zeros(3)}]
    >>> plane = loss_plane(lambda p: p["w"].square().sum(), path, resolution=3)
    >>> plane.losses.shape, round(sum(plane.shares), 6), plane.path[-1].tolist()
    (torch.Size([3, 3]), 1.0, [0.0, 0.0])
    """
    if len(path) < 2 or resolution < 2 or not margin > 0:
        raise ValueError(f"{len(path)} points, resolution={resolution}, margin={margin}: must be >= 2, >= 2 and > 0")
    _check_same(path)
    last = path[-1]
    X = torch.stack([_flat(point) - _flat(last) for point in path[:-1]])
    products = X @ X.T
    if not products.isfinite().all():
        raise ValueError("path: some weights are not finite, or too far apart; leave out the points after a divergence")
    squares, u = torch.linalg.eigh(products.double())
    if not squares[-1] > 0:
        raise ValueError("path: all its points are the same: there is no direction to draw along")
    directions = [X.T @ (u[:, -1] / squares[-1].sqrt()).to(X)]  # (1)
    if len(squares) > 1 and squares[-2] > 1e-10 * squares[-1]:
        directions.append(X.T @ (u[:, -2] / squares[-2].sqrt()).to(X))
    else:  # a straight path: any direction will do
        random = torch.randn(X.shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(X)
        random -= directions[0] * (random @ directions[0])
        directions.append(random / random.norm())
    D = torch.stack(directions)
    coordinates = torch.cat([(X @ D.T).double().cpu(), torch.zeros(1, 2, dtype=torch.float64, device="cpu")])
    shares = coordinates.square().sum(0) / X.double().square().sum().cpu()
    low, high = coordinates.amin(0), coordinates.amax(0)
    # Along a direction in which the path hardly moves the plane is as wide as a fifth of its length.
    reach = torch.maximum(high - low, 0.2 * (high - low).max()) * (0.5 + margin)
    middle = (low + high) / 2
    x, y = (
        torch.linspace(float(m - r), float(m + r), resolution, dtype=torch.float64, device="cpu")
        for m, r in zip(middle, reach, strict=True)
    )
    along = [{k: v.to(device) for k, v in _like(d, last).items()} for d in D]
    centre = {k: v.to(device) for k, v in last.items()}
    with torch.no_grad():
        rows = [
            torch.stack([loss({k: centre[k] + a * along[0][k] + b * along[1][k] for k in centre}) for a in x.tolist()])
            for b in y.tolist()
        ]
    losses = torch.stack(rows).detach().double().cpu()
    return LossPlane(x, y, losses, coordinates, (float(shares[0]), float(shares[1])))


def _flat(point: Parameters) -> Tensor:
    return torch.cat([p.detach().reshape(-1).float() for p in point.values()])


def _like(vector: Tensor, point: Parameters) -> dict[str, Tensor]:
    pieces = vector.split([p.numel() for p in point.values()])
    return {k: piece.view(p.shape).to(p) for (k, p), piece in zip(point.items(), pieces, strict=True)}


def _check_same(path: Sequence[Parameters]) -> None:
    first = {k: p.shape for k, p in path[0].items()}
    for i, point in enumerate(path):
        if {k: p.shape for k, p in point.items()} != first or not first:
            raise ValueError(f"point {i} has other names or shapes than the first; each is a dict of all parameters")
