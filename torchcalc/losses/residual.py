"""Losses of the residual:  L = reduce(ℓ(d)),  d = x - t.  What mse, l1 and huber share.

Derivation.  ∂d/∂x = 1 and ∂d/∂t = -1, so with the slope ℓ'(d) and the 1/n of reduction.py the chain rule gives

    ∂L/∂x = ℓ'(d)/n,   ∂L/∂t = -∂L/∂x,                                            (1)
    dL = Σ ℓ'(d)·(dx - dt) / n.                                                   (2)

Each loss is elementwise until its reduction. Saves x and t, which are alive anyway, and not d.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from torchcalc.autograd import Function
from torchcalc.losses.reduction import per_element, reduce
from torchcalc.promotion import like, widen

__all__ = ["broadcast", "check_weight", "residual_loss"]


def residual_loss(value: Callable[..., Tensor], slope: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The differentiable function of (x, t, reduction, *parameters) with these formulas.

    Args:
        value: torch's kernel ``value(x, t, reduction as torch's enum, *parameters)``; it reduces.
        slope: the derivative ℓ'(d) as ``slope(d, *parameters)``.
    """

    class ResidualLoss(Function):
        autocast = "float32"

        @staticmethod
        def forward(x: Tensor, t: Tensor, reduction: str, *parameters: Any) -> Tensor:
            return value(x, t, _reduction.get_enum(reduction), *parameters)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, t, ctx.reduction, *ctx.parameters = inputs
            ctx.dtype = output.dtype
            ctx.save_for_backward(x, t)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
            x, t = ctx.saved_tensors
            need_x, need_t, *others = ctx.needs_input_grad
            g = per_element(widen(grad_output), ctx.reduction, x.numel())
            grad = g * slope(widen(x) - widen(t), *ctx.parameters)  # (1)
            return like(grad, x) if need_x else None, like(-grad, t) if need_t else None, *(None for _ in others)

        @staticmethod
        def jvp(ctx: Any, dx: Tensor | None, dt: Tensor | None, *_: None) -> Tensor:
            x, t = ctx.saved_tensors
            d = widen(x) - widen(t)
            change = slope(d, *ctx.parameters).conj() * ((0 if dx is None else dx) - (0 if dt is None else dt))
            change = change.real if change.is_complex() else change
            return reduce(change, ctx.reduction).to(ctx.dtype)  # (2)

    return ResidualLoss.apply


def broadcast(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in their common shape, with torch's warning if they were not: [N, 1] against [N] is N·N residuals."""
    if target.size() == input.size():
        return input, target
    warnings.warn(
        f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
        "This will likely lead to incorrect results due to broadcasting. "
        "Please ensure they have the same size.",
        stacklevel=3,
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
