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


def _row(function: Callable[..., Tensor], *others: float, **options: Any) -> Callable[[Tensor], Tensor]:
    """The first element of a row function, as a function of that element; the others are fixed."""

    def first(x: Tensor) -> Tensor:
        rows = torch.stack([x, *(torch.full_like(x, v) for v in others)], -1)
        return function(rows, **options)[..., 0]

    return first


def _classes(loss: Callable[..., Tensor], target: int) -> Callable[[Tensor], Tensor]:
    """A loss of three classes as a function of the first one's logit; the others are 0."""

    def of_logit(x: Tensor) -> Tensor:
        logits = torch.stack([x, torch.zeros_like(x), torch.zeros_like(x)], -1)
        return loss(logits, torch.full(x.shape, target), reduction="none")

    return of_logit


def _linear_cross_entropy(x: Tensor) -> Tensor:
    weights = torch.tensor([[1.0], [0.0], [0.0]], dtype=x.dtype)
    return f.linear_cross_entropy(x[:, None], weights, torch.zeros(x.shape, dtype=torch.long), reduction="none")


def _attention(query: Tensor) -> Tensor:
    pair = torch.tensor([[1.0], [-1.0]], dtype=query.dtype)
    return f.scaled_dot_product_attention(query[:, None], pair, pair)[:, 0]


def _mlp(gated: bool) -> Callable[[Tensor], Tensor]:
    """A block of one hidden unit, of weights 1 and without biases."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return lambda x: (f.gated_mlp(x[:, None], one, one, one) if gated else f.mlp(x[:, None], one, one))[:, 0]


#: By the page's name: label, function, from, to, what x is.
CURVES: dict[str, list[Curve]] = {
    "activations/abs": [("abs", f.abs, -3, 3, "x")],
    "activations/elu": [("elu", f.elu, -4, 4, "x")],
    "activations/exp": [("exp", f.exp, -3, 2, "x")],
    "activations/glu": [
        ("glu, a = 1", lambda b: f.glu(torch.stack([torch.ones_like(b), b]), 0)[0], -6, 6, "b"),
        ("swiglu, b = 1", lambda a: f.swiglu(a, torch.ones_like(a)), -6, 6, "a"),
        ("geglu, b = 1", lambda a: f.geglu(a, torch.ones_like(a)), -4, 4, "a"),
        ("reglu, b = 1", lambda a: f.reglu(a, torch.ones_like(a)), -4, 4, "a"),
    ],
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
    "layers/softmax": [
        ("softmax of x, 0, 0", _row(f.softmax, 0.0, 0.0, dim=-1), -6, 6, "x"),
        ("log_softmax of x, 0, 0", _row(f.log_softmax, 0.0, 0.0, dim=-1), -6, 6, "x"),
    ],
    "layers/rms_norm": [("rms_norm of x, 1", _row(f.rms_norm, 1.0, normalized_shape=[2]), -5, 5, "x")],
    "layers/add_rms_norm": [
        ("add_rms_norm of x, 1 and 0, 0", _row(lambda x: f.add_rms_norm(x, torch.zeros_like(x), [2])[0], 1.0), -5, 5, "x"),
    ],
    "layers/layer_norm": [("layer_norm of x, -1, 1", _row(f.layer_norm, -1.0, 1.0, normalized_shape=[3]), -5, 5, "x")],
    "layers/group_norm": [("group_norm of x, -1, 1, one group", _row(f.group_norm, -1.0, 1.0, num_groups=1), -5, 5, "x")],
    "layers/attention": [("two keys and values, 1 and -1", _attention, -4, 4, "query")],
    "layers/mlp": [
        ("mlp of one unit, gelu", _mlp(False), -4, 4, "x"),
        ("gated_mlp of one unit, silu", _mlp(True), -4, 4, "x"),
    ],
    "losses/cross_entropy": [
        ("its logit, the others 0", _classes(f.cross_entropy, 0), -6, 6, "logit of the target"),
        ("another's logit, the others 0", _classes(f.cross_entropy, 1), -6, 6, "logit of another class"),
    ],
    "losses/linear_cross_entropy": [("weights 1, 0, 0; target the first", _linear_cross_entropy, -6, 6, "input")],
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
    rows, columns = (len(CURVES[page]) + 1) // 2, min(2, len(CURVES[page]))
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.3 * rows), layout="constrained")
    # Curves may coincide, as those of exp do: the wide, the narrow and the dashed one show above each other.
    lines = ((BLUE, "f", 3.4, "-"), (ORANGE, "f′", 1.9, "-"), (GREEN, "f″", 1.4, (0, (3, 1.5))))
    for ax, curve in zip(figure.subplots(rows, columns, squeeze=False).flat, CURVES[page], strict=True):
        x, *values = derivatives(curve)
        for y, (colour, label, width, style) in zip(values, lines, strict=True):
            jump = y.diff().abs() > max(0.2, 0.1 * float(y.max() - y.min()))  # no line from one side of it to the other
            y = torch.where(torch.cat([jump, jump[:1] & False]), torch.nan, y)
            ax.plot(x, y, color=colour, label=label, linewidth=width, linestyle=style)
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
