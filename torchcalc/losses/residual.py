"""Losses of the residual:  L = reduce(ℓ(d)),  d = x - t.  What mse, l1 and huber share.

Derivation.  ∂d/∂x = 1 and ∂d/∂t = -1, so with the slope ℓ'(d) and the 1/n of reduction.py the chain rule gives

    ∂L/∂x = ℓ'(d)/n,   ∂L/∂t = -∂L/∂x,                                            (1)
    dL = Σ ℓ'(d)·(dx - dt) / n.                                                   (2)

Each loss is elementwise until its reduction. Saves x and t, which are alive anyway, and not d.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcalc.formula import Term, loss

__all__ = ["broadcast", "check_weight", "residual_loss"]


def residual_loss(
    name: str, value: Callable[..., Any], slope: Callable[..., Any], torch_value: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """The differentiable loss of (x, t, weight, reduction, by_weight, *parameters) with these formulas of the residual.

    Args:
        name: see :class:`torchcalc.formula.pointwise.Formula`.
        value: ℓ(d), and its parameters keyword-only.
        slope: ℓ'(d), likewise.
        torch_value: torch's kernel ``(x, t, reduction as torch's enum, *parameters)``.
    """
    parameters = [p for p in inspect.signature(value).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def of_pair(x: Term, t: Term, **numbers: float) -> Term:
        return value(x - t, **numbers)

    def slope_x(x: Term, t: Term, **numbers: float) -> Term:
        return slope(x - t, **numbers)  # (1)

    def slope_t(x: Term, t: Term, **numbers: float) -> Term:
        return -slope(x - t, **numbers)

    for f in (of_pair, slope_x, slope_t):
        pair = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in "xt"]
        f.__signature__ = inspect.Signature([*pair, *parameters])  # type: ignore[attr-defined]
        f.__module__ = value.__module__
    return loss(name, of_pair, slope_x, slope_t, torch_value=torch_value)


def broadcast(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in their common shape, with torch's warning if they were not: [N, 1] against [N] is N·N residuals."""
    if target.size() == input.size():
        return input, target
    warnings.warn(
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
        "This will likely lead to incorrect results due to broadcasting. "
        "Please ensure they have the same size.",
        stacklevel=4,  # above the loss, and what makes it a leaf
    )
    input, target = torch.broadcast_tensors(input, target)
    return input, target


def check_weight(weight: Tensor, input: Tensor) -> None:
    """Raise torch's ValueError if the sizes differ."""
    if weight.size() != input.size():
        raise ValueError(
            "Weights and input must have the same size."
            f" Got weight {tuple(weight.shape)} and input {tuple(input.shape)}; use weight.expand_as(input)."
        )
