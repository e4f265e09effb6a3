"""Adam and AdamW: each weight's step is its running mean gradient over its running root-mean-square gradient.

Rule, for the gradient g at step t (−g if maximize), with decay rates β₁, β₂, weight decay λ, step size lr:

    g ← g + λ·p                 Adam: weight decay as a gradient                  (1)
    p ← p − lr·λ·p              AdamW: weight decay beside the gradient           (1')
    m ← m + (1 − β₁)·(g − m)    the mean of g                                     (2)
    v ← β₂·v + (1 − β₂)·g²      the mean of g²                                    (3)
    u = v, or with amsgrad the largest v so far                                   (4)
    p ← p − lr/(1 − β₁ᵗ) · m / (√u/√(1 − β₂ᵗ) + ε)                                (5)

Why the corrections 1 − βᵗ: m starts at 0, so after t steps m = (1 − β)·Σ βᵗ⁻ⁱ·gᵢ, whose weights sum to 1 − βᵗ. For a
constant gradient g, (5) is then lr·g/(|g| + ε) at every t, the first included: a step of lr, whatever the scale of
the loss.

References: Kingma, Ba 2015, arXiv:1412.6980, whose v̂ is v/(1 − β₂ᵗ). Loshchilov, Hutter 2019, arXiv:1711.05101 (AdamW):
their algorithm 2 has lr = η·α, of a schedule η and a constant α, and decays by η·λ, not by α; (1') is torch's, lr·λ.
Reddi et al. 2018, arXiv:1904.09237 (amsgrad; as torch does, the maximum is taken before the correction).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchcalc.native.optim import Bound
from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import (
    check_at_least_zero,
    check_betas,
    check_implementation,
    check_one_element,
    check_tensor_betas,
    check_tensor_lr,
)
from torchcalc.optim.extras import Scaling
from torchcalc.optim.optimizer import Optimizer, ParamsT, to_scalar
from torchcalc.optim.tensor_list import Scalar, Vector, add_product_, add_ratio_, add_scaled, as_real, average_

__all__ = ["Adam", "AdamW"]


def adam(
    p: Vector,
    g: Vector,
    m: Vector,
    v: Vector,
    v_max: Vector | None = None,
    *,
    t: Scalar,
    lr: Scalar,
    b1: Scalar,
    b2: Scalar,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    if weight_decay != 0:
        if decoupled:
            p.mul_(1 - lr * weight_decay)  # (1')
        else:
            g = add_scaled(g, p, weight_decay)  # (1)
    p, g, m, v, v_max = as_real(p, g, m, v, v_max)
    average_(m, g, b1)  # (2)
    add_product_(v.mul_(b2), g, g, 1 - b2)  # (3)
    if v_max is not None:
        v = v_max.clamp_min_(v)  # (4)
    denominator = v.sqrt().div_((1 - b2**t) ** 0.5).add_(eps)
    add_ratio_(p, m, denominator, -(lr / (1 - b1**t)))  # (5)


@documented
class Adam(Optimizer):
    """Adam: a drop-in for ``torch.optim.Adam``.

    Args:
        betas: (β₁, β₂), both in [0, 1), both floats or both 1-element tensors: what the means of the gradient and of its square
            keep at each step; nearer to 1, they forget more slowly and are smoother.
        eps: ε >= 0, what the step is measured against where gradients are tiny.
        weight_decay: λ >= 0, pulls each weight towards 0 by λ·p, as a part of its gradient.
        amsgrad: divide by the largest v so far, so that no step grows because v has shrunk.
        decoupled_weight_decay: weight decay beside the gradient, (1') instead of (1): AdamW.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Adam([p], lr=0.1)
    >>> p.grad = torch.tensor([1000.0])
    >>> optimizer.step()
    >>> round(p.item(), 4)  # one lr, whatever the gradient's scale
    0.9
    """

    rule = staticmethod(adam)
    variants: ClassVar = {"weight_decay": (0, 0.1), "amsgrad": (False, True)}
    added_later: ClassVar[dict[str, Any]] = {
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "decoupled_weight_decay": False,
    }
    sparse_error = "Adam does not support sparse gradients, please consider SparseAdam instead"

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None: ...

    def native(
        self, bound: Bound, grads: list[Tensor], group: dict[str, Any], first: list[int], scaling: Scaling
    ) -> int:
        b1, b2 = group["betas"]
        return bound.adam_(
            grads,
            lr=float(group["lr"]),
            beta1=float(b1),
            beta2=float(b2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            grad_coef=float(scaling.coefficient),
            grad_scale=scaling.grad_scale,
            seed=scaling.seed,
        )

    def torch_fused(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        slots: list[list[Tensor]],
        steps: list[Tensor],
        group: dict[str, Any],
        first: bool,
    ) -> None:
        b1, b2 = group["betas"]
        operation = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        operation(
            params,
            grads,
            slots[0],
            slots[1],
            slots[2] if group["amsgrad"] else [],
            steps,
            lr=float(group["lr"]),
            beta1=float(b1),
            beta2=float(b2),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )

    def check(self, group: dict[str, Any]) -> None:
        check_tensor_lr(group)
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])
        check_at_least_zero("epsilon value", group["eps"])
        check_betas(group["betas"])
        check_at_least_zero("weight_decay value", group["weight_decay"])
        check_tensor_betas(group)
        check_implementation(group)

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        b1, b2 = group["betas"]
        return {
            "lr": group["lr"],
            "b1": to_scalar(b1),
            "b2": to_scalar(b2),
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "decoupled": group["decoupled_weight_decay"],
        }

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        averages = {"m": "exp_avg", "v": "exp_avg_sq"}
        return {**averages, "v_max": "max_exp_avg_sq"} if group["amsgrad"] else averages


@documented
class AdamW(Adam):
    """AdamW, Adam with decoupled weight decay (1'): a drop-in for ``torch.optim.AdamW``.

    Args:
        weight_decay: λ >= 0, shrinks each weight by the factor 1 - lr·λ, beside the gradient.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = AdamW([p], lr=0.1, weight_decay=0.5)
    >>> p.grad = torch.tensor([0.0])
    >>> optimizer.step()
    >>> round(p.item(), 4)  # no gradient: only 1 - lr * weight_decay
    0.95
    """

    @takes_defaults(decoupled_weight_decay=True)
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None: ...

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # also for a checkpoint of Adam
