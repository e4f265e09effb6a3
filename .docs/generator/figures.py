"""The reference's figures: f, f' and f'' by autograd through the functions themselves, and paths of the optimizers."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from torchcalc import functional as f
from torchcalc import optim
from torchcalc.convergence import SURFACES

__all__ = ["CURVES", "SETTINGS", "curves", "path"]

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
Curve = tuple[str, Callable[[Tensor], Tensor], float, float, str]


def _against(loss: Callable[..., Tensor], target: float, *more: float, **options: Any) -> Callable[[Tensor], Tensor]:
    """A loss of one number against a target, as a function of the prediction."""
    return lambda x: loss(
        x, torch.full_like(x, target), *(torch.full_like(x, v) for v in more), reduction="none", **options
    )


#: By the page's name: label, function, from, to, what x is.
CURVES: dict[str, list[Curve]] = {
    "activations/abs": [("abs", f.abs, -3, 3, "x")],
    "activations/elu": [("elu", f.elu, -4, 4, "x")],
    "activations/exp": [("exp", f.exp, -3, 2, "x")],
    "activations/gelu": [("gelu", f.gelu, -4, 4, "x"), ("gelu, tanh", partial(f.gelu, approximate="tanh"), -4, 4, "x")],
    "activations/leaky_relu": [("leaky_relu", partial(f.leaky_relu, negative_slope=0.1), -4, 4, "x")],
    "activations/log": [("log", f.log, 0.3, 4, "x")],
    "activations/logsigmoid": [("logsigmoid", f.logsigmoid, -5, 5, "x")],
    "activations/mish": [("mish", f.mish, -5, 5, "x")],
    "activations/relu": [("relu", f.relu, -4, 4, "x")],
    "activations/sigmoid": [("sigmoid", f.sigmoid, -6, 6, "x")],
    "activations/silu": [("silu", f.silu, -6, 6, "x")],
    "activations/softcap": [("softcap, cap = 2", partial(f.softcap, cap=2.0), -6, 6, "x")],
    "activations/softplus": [("softplus", f.softplus, -6, 6, "x")],
    "activations/square": [("square", f.square, -2, 2, "x")],
    "activations/tanh": [("tanh", f.tanh, -4, 4, "x")],
    "losses/mse": [("mse_loss", _against(f.mse_loss, 0), -2, 2, "input - target")],
    "losses/l1": [("l1_loss", _against(f.l1_loss, 0), -3, 3, "input - target")],
    "losses/huber": [("huber_loss, delta = 1", _against(f.huber_loss, 0), -3, 3, "input - target")],
    "losses/smooth_l1": [("smooth_l1_loss, beta = 1", _against(f.smooth_l1_loss, 0), -3, 3, "input - target")],
    "losses/binary_cross_entropy": [
        ("…with_logits, target 1", _against(f.binary_cross_entropy_with_logits, 1), -5, 5, "logit"),
        ("binary_cross_entropy, target 1", _against(f.binary_cross_entropy, 1), 0.2, 0.98, "probability"),
    ],
    "losses/kl_div": [("kl_div, target 0.5", _against(f.kl_div, 0.5), -4, 0, "log-probability")],
    "losses/poisson_nll": [("poisson_nll_loss, target 2", _against(f.poisson_nll_loss, 2), -2, 2, "log of the rate")],
    "losses/gaussian_nll": [
        ("gaussian_nll_loss, variance 1", _against(f.gaussian_nll_loss, 0, 1), -3, 3, "input - target"),
    ],
}  # fmt: skip


def derivatives(curve: Curve, points: int = 401) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, f, f' and f'' in float64."""
    _, function, low, high, _ = curve
    x = torch.linspace(low, high, points, dtype=torch.float64, requires_grad=True)
    y = function(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    second = torch.zeros_like(x)
    if first.requires_grad:
        found = torch.autograd.grad(first.sum(), x, allow_unused=True)[0]
        second = second if found is None else found
    return x.detach(), y.detach(), first.detach(), second.detach()


def curves(page: str) -> str:
    """An SVG of the curves of a page."""
    figure = Figure(figsize=(4.2 * len(CURVES[page]) + 0.6, 3.3), layout="constrained")
    for ax, curve in zip(figure.subplots(1, len(CURVES[page]), squeeze=False)[0], CURVES[page], strict=True):
        x, *values = derivatives(curve)
        for y, colour, label in zip(values, (BLUE, ORANGE, GREEN), ("f", "f′", "f″"), strict=True):
            jump = y.diff().abs() > max(0.2, 0.1 * float(y.max() - y.min()))  # no line from one side of it to the other
            y = torch.where(torch.cat([jump, jump[:1] & False]), torch.nan, y)
            ax.plot(x, y, color=colour, label=label, linewidth=1.8)
        ax.axhline(0, color="#BBBBBB", linewidth=0.6, zorder=0)
        ax.set(title=curve[0], xlabel=curve[4])
        ax.grid(color="#EEEEEE")
        ax.legend(frameon=False)
    return svg(figure)


#: How each optimizer is shown on the bowl, whose curvatures are 1 and 20.
SETTINGS: dict[str, dict[str, Any]] = {
    "GradientDescent": dict(lr=0.09),
    "SGD": dict(lr=0.03, momentum=0.8),
    "Adam": dict(lr=0.3),
    "AdamW": dict(lr=0.3, weight_decay=0.1),
    "RMSprop": dict(lr=0.2),
    "Adagrad": dict(lr=1.0),
    "NAdam": dict(lr=0.3),
    "RAdam": dict(lr=0.08),
    "Adamax": dict(lr=0.4),
    "Adadelta": dict(lr=20.0),
    "ASGD": dict(lr=0.09),
    "Rprop": dict(lr=0.2),
    "Lion": dict(lr=0.15),
}


def descend(name: str, steps: int = 60) -> tuple[Tensor, Tensor]:
    """The points (steps + 1, 2) and the losses on the bowl."""
    bowl = SURFACES["bowl"]
    p = torch.nn.Parameter(torch.tensor(bowl.start))
    optimizer = getattr(optim, name)([p], **SETTINGS[name])
    points = [p.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        bowl(p).backward()
        optimizer.step()
        points.append(p.detach().clone())
    path = torch.stack(points)
    return path, bowl(path)


def path(name: str) -> str:
    """An SVG of an optimizer's path through the valley, and of the loss along it."""
    bowl = SURFACES["bowl"]
    points, losses = descend(name)
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    x0, x1, y0, y1 = bowl.bounds
    grid = torch.cartesian_prod(torch.linspace(x0, x1, 121), torch.linspace(y0, y1, 91)).view(121, 91, 2)
    left.contour(
        grid[:, 0, 0],
        grid[0, :, 1],
        bowl(grid).T,
        levels=[0.1, 0.5, 2, 5, 10, 20, 35, 55],
        colors="#BBBBBB",
        linewidths=0.8,
    )
    left.plot(points[:, 0], points[:, 1], "o-", color=BLUE, markersize=2.5, linewidth=1)
    left.plot(*bowl.minima[0], "+", color=ORANGE, markersize=11, markeredgewidth=2)
    left.set(xlim=(x0, x1), ylim=(y0, y1), xlabel="x, curvature 1", ylabel="y, curvature 20")
    right.plot(losses, color=BLUE)
    right.set(
        yscale="log", xlabel="step", ylabel="loss", ylim=(max(float(losses.min()), 1e-12) / 2, 2 * float(losses.max()))
    )
    right.grid(color="#EEEEEE")
    return svg(figure)


def svg(figure: Figure) -> str:
    """The picture as text, the same for the same figure."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "torchcalc", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
