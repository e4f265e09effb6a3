"""Lion: step by the sign of a momentum, every weight by the same amount.

Rule, for the gradient g (−g if maximize), with β₁, β₂, decoupled weight decay λ, step size lr:

    p ← p − lr·λ·p                                                                (1)
    p ← p − lr·sign(m + (1 − β₁)·(g − m))      weights g more than m does         (2)
    m ← m + (1 − β₂)·(g − m)                                                      (3)

One slot of state where Adam has two. Since each step has size lr in every weight, lr wants to be 3 to 10 times
smaller than Adam's, and λ larger by as much (the authors' advice).

Reference: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_betas, check_implementation, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT, to_scalar
from torchcalc.optim.tensor_list import Scalar, Vector, add_scaled_, as_real, average_

__all__ = ["Lion"]


def lion(p: Vector, g: Vector, m: Vector, *, lr: Scalar, b1: Scalar, b2: Scalar, weight_decay: float) -> None:
    p, g, m = as_real(p, g, m)
    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)  # (1)
    add_scaled_(p, average_(m.clone(), g, b1).sign_(), -lr)  # (2)
    average_(m, g, b2)  # (3)


@documented
class Lion(Optimizer):
    """Lion (evolved sign momentum); torch has none.

    Args:
        betas: (β₁, β₂), both in [0, 1): β₁ is the weight of past gradients in the sign that is stepped by, β₂ what their mean
            keeps at each step.
        weight_decay: λ >= 0, shrinks each weight by the factor 1 - lr·λ, beside the gradient.
        differentiable: let autograd record the step (the sign has derivative 0).

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = Lion([p], lr=0.25)
    >>> p.grad = torch.tensor([1000.0, -0.001])
    >>> optimizer.step()
    >>> p.tolist()
    [0.75, 1.25]
    """

    rule = staticmethod(lion)
    variants: ClassVar = {"weight_decay": (0, 0.1)}
    sparse_error = "Lion does not support sparse gradients"
    counts_steps: ClassVar[bool] = False

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None: ...

    def check(self, group: dict[str, Any]) -> None:
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])
        check_betas(group["betas"])
        check_at_least_zero("weight_decay value", group["weight_decay"])
        check_implementation(group)

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        b1, b2 = map(to_scalar, group["betas"])
        return {"lr": group["lr"], "b1": b1, "b2": b2, "weight_decay": group["weight_decay"]}

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        return {"m": "exp_avg"}
