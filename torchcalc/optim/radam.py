"""RAdam: Adam that waits until its second moment is worth dividing by.

Rule, for the gradient g at step t (−g if maximize), with decay rates β₁, β₂, weight decay λ, step size lr:

    g ← g + λ·p,  or  p ← p − lr·λ·p  decoupled                                   (1)
    m ← m + (1 − β₁)·(g − m),     v ← β₂·v + (1 − β₂)·g²                          (2)
    ρ∞ = 2/(1 − β₂) − 1,          ρₜ = ρ∞ − 2t·β₂ᵗ/(1 − β₂ᵗ)                      (3)
    p ← p − lr·m/(1 − β₁ᵗ) · r·√(1 − β₂ᵗ)/(√v + ε)       if ρₜ > 5                (4)
    p ← p − lr·m/(1 − β₁ᵗ)                               before                   (5)
    r = √( (ρₜ − 4)(ρₜ − 2)·ρ∞ / ((ρ∞ − 4)(ρ∞ − 2)·ρₜ) )                          (6)

Why: 1/√v, taken from few gradients, scatters so much that its variance is infinite for ρₜ ≤ 4, where ρₜ is the number of
gradients that the average (2) amounts to: the length of the simple moving average with the same centre of mass. (3)
starts at ρ₁ = 1 and tends to ρ∞. r is the factor that gives 1/√v the standard deviation at ρₜ that it has at ρ∞. Until
ρₜ > 5, which is step 6 for β₂ = 0.999, the step is that of momentum (5).

Reference: Liu et al. 2020, "On the variance of the adaptive learning rate and beyond", arXiv:1908.03265.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_betas, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT, to_scalar
from torchcalc.optim.tensor_list import (
    Scalar,
    Vector,
    add_product_,
    add_scaled,
    as_real,
    at_least,
    average_,
    choose,
)

__all__ = ["RAdam"]


def radam(
    p: Vector,
    g: Vector,
    m: Vector,
    v: Vector,
    *,
    t: Scalar,
    lr: Scalar,
    b1: Scalar,
    b2: Scalar,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    p, g, m, v = as_real(p, g, m, v)
    if weight_decay != 0:
        if decoupled:
            p.mul_(1 - lr * weight_decay)  # (1)
        else:
            g = add_scaled(g, p, weight_decay)  # (1)
    average_(m, g, b1)  # (2)
    add_product_(v.mul_(b2), g, g, 1 - b2)  # (2)
    rest = 1 - b2**t
    rho_inf = 2 / (1 - b2) - 1  # (3)
    rho = rho_inf - 2 * t * (b2**t) / rest  # (3)
    # (6) is used where ρ∞ > ρₜ > 5, and the bounds change nothing there. Elsewhere they keep it from 0, where the slope of
    # the root is infinite, and autograd would multiply that by the 0 of what is not chosen.
    least = at_least(rho_inf - 4, 1.0) * at_least(rho_inf - 2, 3.0)
    r = (at_least(rho - 4, 1.0) * at_least(rho - 2, 3.0) * rho_inf / (least * rho)) ** 0.5  # (6)
    step = m.div(1 - b1**t).mul_(lr)
    adapted = step.mul(v.sqrt().add_(eps).reciprocal_().mul_(rest**0.5)).mul_(r)
    p.add_(choose(rho > 5.0, adapted, step), alpha=-1)  # (4), (5)


@documented
class RAdam(Optimizer):
    """RAdam (rectified Adam): a drop-in for ``torch.optim.RAdam``.

    Args:
        betas: (β₁, β₂), both in [0, 1): what the means of the gradient and of its square keep at each step; nearer to 1, they
            forget more slowly and are smoother.
        eps: ε >= 0, keeps the step finite where gradients are tiny.
        weight_decay: λ >= 0, pulls each weight towards 0 by λ·p, as a part of its gradient.
        decoupled_weight_decay: weight decay beside the gradient, as in AdamW.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = RAdam([p], lr=0.1)
    >>> p.grad = torch.tensor([2.0])
    >>> optimizer.step()
    >>> round(p.item(), 4)  # the first steps are momentum's: lr * gradient
    0.8
    """

    rule = staticmethod(radam)
    variants: ClassVar = {"weight_decay": (0, 0.1), "decoupled_weight_decay": (False, True)}
    added_later: ClassVar[dict[str, Any]] = {"foreach": None, "decoupled_weight_decay": False, "maximize": False}
    sparse_error = "RAdam does not support sparse gradients"

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
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
        return {
            "lr": group["lr"],
            "b1": b1,
            "b2": b2,
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": group["decoupled_weight_decay"],
        }

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        return {"m": "exp_avg", "v": "exp_avg_sq"}
