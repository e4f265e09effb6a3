"""Reduction of the losses of the elements to one number:  L = ℓ (none),  Σᵢ ℓᵢ (sum),  Σᵢ ℓᵢ / N (mean).

Derivation.  With n = 1 for none and sum and n = N for mean,

    ∂L/∂ℓᵢ = 1/n.                                                                 (1)

With weights, L = Σᵢ wᵢ·ℓᵢ / n (without the sum for none), where n = 1 for sum, and for mean n = Σᵢ wᵢ (a weighted mean)
or n = N (a mean of weighted
losses: torch has the former in mse_loss and l1_loss, the latter in huber_loss). By the quotient rule

    ∂L/∂ℓᵢ = wᵢ/n                                                                 (2)
    ∂L/∂wᵢ = ℓᵢ/n - L·(∂n/∂wᵢ)/n,   ∂n/∂wᵢ = 1 if n = Σᵢ wᵢ, else 0.              (3)

Saves ℓ and w.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from torchcalc.autograd import Function
from torchcalc.promotion import like, unbroadcast, widen

__all__ = ["per_element", "reduce", "resolve", "weighted"]


def resolve(reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> str:
    """The reduction that is meant, where torch's deprecated arguments or name say it; with torch's warning."""
    if size_average is not None or reduce is not None:
        return _reduction.legacy_get_string(size_average, reduce)
    if reduction == "elementwise_mean":
        _reduction.get_enum(reduction)  # warns
        return "mean"
    return reduction


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """None, mean or sum over all elements.

    >>> reduce(torch.tensor([1.0, 2.0]), "mean").item()
    1.5
    """
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def per_element(grad_output: Tensor, reduction: str, n: int) -> Tensor:
    """∂/∂ℓ of the reduced loss: grad_output, or grad_output / n for a mean over n elements; broadcasts against ℓ."""
    return grad_output / n if reduction == "mean" else grad_output  # (1)


class WeightedReduction(Function):
    autocast = "float32"

    @staticmethod
    def forward(loss: Tensor, w: Tensor, reduction: str, by_weight: bool) -> Tensor:
        total = reduce(widen(loss) * widen(w), "none" if reduction == "none" else "sum")
        n = WeightedReduction.normalizer(loss, widen(w), reduction, by_weight)
        return (total / n).to(torch.promote_types(loss.dtype, w.dtype))

    @staticmethod
    def normalizer(loss: Tensor, w: Tensor, reduction: str, by_weight: bool) -> Tensor | int:
        """The n of the derivation."""
        if reduction != "mean":
            return 1
        return w.sum() if by_weight else loss.numel()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        loss, w, *ctx.options = inputs
        ctx.save_for_backward(loss, w)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        loss, w = ctx.saved_tensors
        need_loss, need_w, *_ = ctx.needs_input_grad
        n = WeightedReduction.normalizer(loss, widen(w), *ctx.options)
        g = widen(grad_output) / n
        grad_loss = like((g * widen(w)).expand_as(loss), loss) if need_loss else None  # (2)
        grad_w = unbroadcast(g * widen(loss), w) if need_w else None  # (3), first term
        if grad_w is not None and isinstance(n, Tensor):
            grad_w = grad_w - like(g * (widen(w) * widen(loss)).sum() / n, w)  # (3), second term
        return grad_loss, grad_w, None, None

    @staticmethod
    def jvp(ctx: Any, dloss: Tensor, dw: Tensor | None, *_: None) -> Tensor:
        loss, w = ctx.saved_tensors
        n = WeightedReduction.normalizer(loss, widen(w), *ctx.options)
        change = widen(w) * dloss if dw is None else widen(w) * dloss + widen(loss) * dw  # (2), (3)
        if ctx.options[0] != "none":
            change = change.sum()
        if dw is not None and isinstance(n, Tensor):
            change = change - (widen(w) * widen(loss)).sum() / n * dw.sum()
        return (change / n).to(torch.promote_types(loss.dtype, w.dtype))


def weighted(loss: Tensor, weight: Tensor, reduction: str, by_weight: bool) -> Tensor:
    """weight·loss reduced; a mean is over the sum of the weights if ``by_weight``, else over the number of elements.

    Raises:
        ValueError: if ``reduction`` is unknown.

    >>> weighted(torch.tensor([1.0, 4.0]), torch.tensor([3.0, 1.0]), "mean", by_weight=True).item()
    1.75
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")
    return WeightedReduction.apply(loss, weight, reduction, by_weight)
