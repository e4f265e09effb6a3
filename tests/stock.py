"""What only newer versions of torch have, as torch defines it: the oracle on every torch."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    **how: Any,
) -> Tensor:
    b = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(input, linear_weight.flatten(0, -2), b).unflatten(-1, linear_weight.shape[:-1])
    return F.cross_entropy(logits, target, ignore_index=-100 if ignore_index is None else ignore_index, **how)


class _LinearCrossEntropyLoss(torch.nn.Module):
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        weight: Tensor | None = None,
        options: object = None,
        **how: Any,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.shape, self.how = (num_classes, *out_features), how
        self.linear = torch.nn.Linear(in_features, math.prod(self.shape), bias=bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        w = self.linear.weight.unflatten(0, self.shape)
        return linear_cross_entropy(x, w, t, linear_bias=self.linear.bias, weight=self.weight, **self.how)


_LinearCrossEntropyLoss.__name__ = "LinearCrossEntropyLoss"

# From torch 2.13 on.
HAS_LINEAR_CROSS_ENTROPY = hasattr(F, "linear_cross_entropy")
linear_cross_entropy = getattr(F, "linear_cross_entropy", _linear_cross_entropy)
LinearCrossEntropyLoss = getattr(torch.nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss)
LinearCrossEntropyOptions = getattr(torch.nn, "LinearCrossEntropyOptions", object)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    """Its gradient at NaN is NaN, where torch's is NaN or a number, as a loop takes the element or its remainder."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low = torch.where(wide > 0, 0, wide)
    return torch.where(wide > 0, wide, alpha * torch.expm1(low)).to(x.dtype)


def softcap(x: Tensor, cap: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return ((wide / cap).tanh() * cap).to(x.dtype)


def cross_entropy(
    x: Tensor,
    t: Tensor,
    w: Tensor | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """torch's, of operations, with what torch does not have."""
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    losses = F.cross_entropy(x, t, w, reduction="none", label_smoothing=label_smoothing)
    counts = torch.ones_like(losses) if t.is_floating_point() else (t != -100).to(x.dtype)
    losses = losses + z_loss * torch.logsumexp(x, 1).square() * counts
    u = torch.ones_like(losses) if token_weight is None else token_weight
    if reduction == "none":
        return losses * u
    if normalizer is None:
        share = counts if w is None or t.is_floating_point() else w[t.clamp(min=0)] * counts
        normalizer = (u * share).sum() if reduction == "mean" else 1
    return (losses * u).sum() / normalizer


class MLP(torch.nn.Sequential):
    """torch has no such module; these are the stock parts that ours stands for."""

    def __init__(self, in_features, hidden_features, out_features=None, activation="gelu", bias=True, recompute=False):
        parts = {"gelu": torch.nn.GELU, "relu": torch.nn.ReLU}
        super().__init__(
            torch.nn.Linear(in_features, hidden_features, bias),
            parts[activation](),
            torch.nn.Linear(hidden_features, out_features or in_features, bias),
        )


class GatedMLP(torch.nn.Module):
    def __init__(self, in_features, hidden_features, out_features=None, activation="silu", bias=False, recompute=False):
        super().__init__()
        self.gate_proj = torch.nn.Linear(in_features, hidden_features, bias)
        self.up_proj = torch.nn.Linear(in_features, hidden_features, bias)
        self.down_proj = torch.nn.Linear(hidden_features, out_features or in_features, bias)
        self.activation, self.recompute = activation, recompute

    def extra_repr(self):
        return f"activation={self.activation!r}" + (", recompute=True" if self.recompute else "")

    def forward(self, x):
        act = getattr(torch.nn.functional, self.activation)
        return self.down_proj(act(self.gate_proj(x)) * self.up_proj(x))
