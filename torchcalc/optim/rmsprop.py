"""RMSprop: divide each weight's gradient by its running root mean square.

Rule, for the gradient g (−g if maximize), with smoothing α, weight decay λ, momentum μ, step size lr:

    g ← g + λ·p                                                                   (1)
    v ← α·v + (1 − α)·g²            the mean of g²                                (2)
    m ← m + (1 − α)·(g − m)         centered: the mean of g ...                   (3)
    s = √max(v − m², 0) + ε, or √v + ε   ... whose square leaves the variance     (4)
    b ← μ·b + g/s,  p ← p − lr·b    with momentum                                 (5)
    p ← p − lr·g/s                  without                                       (6)

The maximum in (4) differs from torch: v ≥ m² by Jensen's inequality, but where the gradient hardly changes the rounded difference
falls below 0, and its root would be NaN for good.

There is no bias correction: v starts at 0, so the first steps are larger, by 1/√(1 − α). ε stands outside the root,
as in torch and not as in TensorFlow.

References: Tieleman, Hinton 2012, lecture 6.5 of "Neural networks for machine learning"; Graves 2013, arXiv:1308.0850
(centered).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT
from torchcalc.optim.tensor_list import (
    Scalar,
    Vector,
    add_product_,
    add_ratio_,
    add_scaled,
    add_scaled_,
    as_real,
    average_,
)

__all__ = ["RMSprop"]


def rmsprop(
    p: Vector,
    g: Vector,
    v: Vector,
    b: Vector | None = None,
    m: Vector | None = None,
    *,
    t: Scalar,
    lr: Scalar,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
) -> None:
    if weight_decay != 0:
        g = add_scaled(g, p, weight_decay)  # (1)
    p, g, v, b, m = as_real(p, g, v, b, m)
    add_product_(v.mul_(alpha), g, g, 1 - alpha)  # (2)
    if m is not None:
        average_(m, g, alpha)  # (3)
        v = v.addcmul(m, m, value=-1).clamp_min_(0.0)
    s = v.sqrt().add_(eps)  # (4)
    if b is not None:
        b.mul_(momentum).addcdiv_(g, s)
        add_scaled_(p, b, -lr)  # (5)
    else:
        add_ratio_(p, g, s, -lr)  # (6)


@documented
class RMSprop(Optimizer):
    """RMSprop: a drop-in for ``torch.optim.RMSprop``.

    Args:
        alpha: α >= 0, what the mean of squares keeps at each step: nearer to 1, it forgets more slowly.
        eps: ε >= 0, keeps the step finite where gradients are tiny; larger, it makes the step more like SGD's.
        weight_decay: λ >= 0, pulls each weight towards 0 by λ·p, as a part of its gradient.
        momentum: μ >= 0, what the sum of past steps keeps at each step; 0 keeps no buffer.
        centered: divide by the standard deviation of the gradient.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = RMSprop([p], lr=0.01)
    >>> p.grad = torch.tensor([5.0])
    >>> optimizer.step()
    >>> round(p.item(), 4)  # 1 - 0.01 / sqrt(1 - 0.99)
    0.9
    """

    rule = staticmethod(rmsprop)
    variants: ClassVar = {"weight_decay": (0, 0.1), "momentum": (0, 0.9), "centered": (False, True)}
    added_later: ClassVar[dict[str, Any]] = {"momentum": 0, "centered": False, "foreach": None, "maximize": False}
    sparse_error = "RMSprop does not support sparse gradients"

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None: ...

    def check(self, group: dict[str, Any]) -> None:
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])
        check_at_least_zero("epsilon value", group["eps"])
        check_at_least_zero("momentum value", group["momentum"])
        check_at_least_zero("weight_decay value", group["weight_decay"])
        check_at_least_zero("alpha value", group["alpha"])

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {k: group[k] for k in ("lr", "alpha", "eps", "weight_decay", "momentum")}

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        slots = {"v": "square_avg"}
        if group["momentum"] > 0:
            slots["b"] = "momentum_buffer"
        if group["centered"]:
            slots["m"] = "grad_avg"
        return slots
