"""Adamax: Adam with the largest gradient in place of the root mean square.

Rule, for the gradient g at step t (−g if maximize), with decay rates β₁, β₂, weight decay λ, step size lr:

    g ← g + λ·p                                                                   (1)
    m ← m + (1 − β₁)·(g − m)                                                      (2)
    u ← max(β₂·u, |g| + ε)                                                        (3)
    p ← p − lr/(1 − β₁ᵗ) · m/u                                                    (4)

Why: Adam's √v is an average of squares. With a power q in place of 2, v ← β₂^q·v + (1 − β₂^q)·|g|^q, the root v^(1/q) tends
to maxᵢ β₂^(t−i)·|gᵢ| as q → ∞, which is what (3) keeps. The factor 1 − β₂^q tends to 1, and its root with it, so u needs no
correction for its start at 0.

ε is inside the maximum, as in torch; the paper has none.

Reference: Kingma, Ba 2015, arXiv:1412.6980, section 7.1.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_betas, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT, to_scalar
from torchcalc.optim.tensor_list import Scalar, Vector, add_ratio_, add_scaled, as_real, average_

__all__ = ["Adamax"]


def adamax(
    p: Vector,
    g: Vector,
    m: Vector,
    u: Vector,
    *,
    t: Scalar,
    lr: Scalar,
    b1: Scalar,
    b2: Scalar,
    eps: float,
    weight_decay: float,
) -> None:
    if weight_decay != 0:
        g = add_scaled(g, p, weight_decay)  # (1)
    p, g, m, u = as_real(p, g, m, u)
    average_(m, g, b1)  # (2)
    u.mul_(b2).clamp_min_(g.abs().add_(eps))  # (3)
    add_ratio_(p, m, u, -(lr / (1 - b1**t)))  # (4)


@documented
class Adamax(Optimizer):
    """Adamax: a drop-in for ``torch.optim.Adamax``.

    Args:
        betas: (β₁, β₂), both in [0, 1): what the mean of the gradient and its largest size keep at each step; nearer to 1,
            they forget more slowly.
        eps: ε >= 0, keeps the step finite where gradients are tiny.
        weight_decay: λ >= 0, pulls each weight towards 0 by λ·p, as a part of its gradient.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Adamax([p], lr=0.1)
    >>> p.grad = torch.tensor([1000.0])
    >>> optimizer.step()
    >>> round(p.item(), 4)  # one lr, whatever the gradient's scale
    0.9
    """

    rule = staticmethod(adamax)
    variants: ClassVar = {"weight_decay": (0, 0.1)}
    sparse_error = "Adamax does not support sparse gradients"

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None: ...

    def check(self, group: dict[str, Any]) -> None:
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])
        check_at_least_zero("epsilon value", group["eps"])
        check_betas(group["betas"])
        check_at_least_zero("weight_decay value", group["weight_decay"])

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        b1, b2 = map(to_scalar, group["betas"])
        return {"lr": group["lr"], "b1": b1, "b2": b2, "eps": group["eps"], "weight_decay": group["weight_decay"]}

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        return {"m": "exp_avg", "u": "exp_inf"}
