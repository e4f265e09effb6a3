"""NAdam: Adam with Nesterov's look ahead.

Rule, for the gradient g at step t (−g if maximize), with β₁, β₂, weight decay λ, momentum decay ψ, step size lr:

    g ← g + λ·p,  or  p ← p − lr·λ·p  decoupled                                   (1)
    μₜ = β₁·(1 − ½·0.96^(t·ψ)),   Π ← Π·μₜ         a momentum that warms up        (2)
    m ← m + (1 − β₁)·(g − m),     v ← β₂·v + (1 − β₂)·g²                          (3)
    s = √(v/(1 − β₂ᵗ)) + ε
    p ← p − lr·(1 − μₜ)/(1 − Π)·g/s − lr·μₜ₊₁/(1 − Π·μₜ₊₁)·m/s                     (4)

(4) is Adam's step with the momentum of the next step already in it: m counts with μₜ₊₁, the fresh gradient with 1 − μₜ.

Reference: Dozat 2016, "Incorporating Nesterov momentum into Adam", ICLR workshop.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_betas, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT, is_readable, read, to_scalar
from torchcalc.optim.tensor_list import Scalar, Vector, add_product_, add_ratio_, add_scaled, as_real, average_

__all__ = ["NAdam"]


def nadam(
    p: Vector,
    g: Vector,
    m: Vector,
    v: Vector,
    *,
    t: Scalar,
    mu: Scalar,
    mu_next: Scalar,
    mu_product: Scalar,
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
    average_(m, g, b1)  # (3)
    add_product_(v.mul_(b2), g, g, 1 - b2)  # (3)
    s = v.div(1 - b2**t).sqrt().add_(eps)
    add_ratio_(p, g, s, -lr * (1.0 - mu) / (1.0 - mu_product))  # (4)
    add_ratio_(p, m, s, (-lr * mu_next) / (1.0 - mu_product * mu_next))  # (4)


def momenta(t: Scalar, b1: Scalar, psi: float) -> tuple[Scalar, Scalar]:
    """(μₜ, μₜ₊₁) of (2)."""
    return b1 * (1.0 - 0.5 * (0.96 ** (t * psi))), b1 * (1.0 - 0.5 * (0.96 ** ((t + 1) * psi)))


@functools.lru_cache(maxsize=16)
def known_momenta(t: float, b1: float, psi: float, dtype: torch.dtype) -> tuple[float, float, Tensor]:
    """The same of numbers; and μₜ as a tensor, by which a tensor is multiplied in a third of the time of a number."""
    mu, mu_next = momenta(t, b1, psi)
    return mu, mu_next, torch.tensor(mu, dtype=dtype, device="cpu")


@documented
class NAdam(Optimizer):
    """NAdam: a drop-in for ``torch.optim.NAdam``.

    Args:
        betas: (β₁, β₂), both in [0, 1): what the means of the gradient and of its square keep at each step; nearer to 1, they
            forget more slowly and are smoother.
        eps: ε >= 0, keeps the step finite where gradients are tiny.
        weight_decay: λ >= 0, pulls each weight towards 0 by λ·p, as a part of its gradient.
        momentum_decay: ψ >= 0, how fast the momentum warms up from β₁/2 to β₁.
        decoupled_weight_decay: weight decay beside the gradient, as in AdamW.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = NAdam([p], lr=0.1)
    >>> p.grad = torch.tensor([5.0])
    >>> optimizer.step()
    >>> 0.8 < p.item() < 1.0
    True
    """

    rule = staticmethod(nadam)
    variants: ClassVar = {"weight_decay": (0, 0.1), "decoupled_weight_decay": (False, True)}
    numbers = ("momentum_decay",)
    scalars: ClassVar[dict[str, float]] = {"step": 0.0, "mu_product": 1.0}
    added_later: ClassVar[dict[str, Any]] = {"foreach": None, "decoupled_weight_decay": False, "maximize": False}
    sparse_error = "NAdam does not support sparse gradients"
    on_device = "params, mu_products and state_steps"

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
        check_at_least_zero("momentum_decay value", group["momentum_decay"])

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

    def advance(
        self, state: dict[str, Any], group: dict[str, Any], hyper: dict[str, Any], first: bool
    ) -> dict[str, Any]:
        t = super().advance(state, group, hyper, first)["t"]
        b1, psi, product = hyper["b1"], group["momentum_decay"], state["mu_product"]
        if type(t) is float and type(b1) is float and is_readable(product):  # the same for all tensors
            mu, mu_next, factor = known_momenta(t, b1, psi, product.dtype)
            product *= factor
            return {"t": t, "mu": mu, "mu_next": mu_next, "mu_product": product.item()}
        mu, mu_next = momenta(t, b1, psi)
        if group["differentiable"]:
            state["mu_product"] = (product * mu).to(product.dtype)
        else:
            product *= mu
        return {"t": t, "mu": mu, "mu_next": mu_next, "mu_product": read(state["mu_product"])}
