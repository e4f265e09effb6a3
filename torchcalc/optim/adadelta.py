"""Adadelta: a step in the units of the weight, from the running mean squares of gradients and of steps.

Rule, for the gradient g (−g if maximize), with decay rate ρ, weight decay λ, step size lr:

    g ← g + λ·p                                                                   (1)
    v ← ρ·v + (1 − ρ)·g²               the mean of g²                             (2)
    d = √(a + ε)/√(v + ε) · g                                                     (3)
    a ← ρ·a + (1 − ρ)·d²               the mean of d²                             (4)
    p ← p − lr·d                                                                  (5)

Why the units are right: for a loss f and a weight x, g = ∂f/∂x has the units of f/x. Newton's step g/(∂²f/∂x²) has those
of x, and so has d in (3): √a is the size of the last steps, and g/√v has no unit. a starts at 0, so the first steps are
of size √ε: ε sets how fast Adadelta starts.

Reference: Zeiler 2012, "ADADELTA: an adaptive learning rate method", arXiv:1212.5701, algorithm 1, which has no lr.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT
from torchcalc.optim.tensor_list import Scalar, Vector, add_product_, add_scaled, add_scaled_, as_kind_of, as_real

__all__ = ["Adadelta"]


def adadelta(
    p: Vector,
    g: Vector,
    v: Vector,
    a: Vector,
    *,
    t: Scalar,
    lr: Scalar,
    rho: float,
    eps: float,
    weight_decay: float,
) -> None:
    if weight_decay != 0:
        g = add_scaled(g, p, weight_decay)  # (1)
    g, v, a = as_real(g, v, a)
    add_product_(v.mul_(rho), g, g, 1 - rho)  # (2)
    d = a.add(eps).sqrt_().div_(v.add(eps).sqrt_()).mul_(g)  # (3)
    add_product_(a.mul_(rho), d, d, 1 - rho)  # (4)
    add_scaled_(p, as_kind_of(p, d), -lr)  # (5)


@documented
class Adadelta(Optimizer):
    """Adadelta: a drop-in for ``torch.optim.Adadelta``.

    Args:
        lr: what the step is multiplied by, a finite number >= 0 or a 1-element tensor.
        rho: ρ in [0, 1], what both means of squares keep at each step: nearer to 1, they forget more slowly.
        eps: ε >= 0, sets the size of the first steps, about √ε: larger, it starts faster.
        weight_decay: λ >= 0, pulls each weight towards 0 by λ·p, as a part of its gradient.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Adadelta([p])
    >>> p.grad = torch.tensor([1000.0])
    >>> optimizer.step()
    >>> round(1 - p.item(), 4)  # the first step is sqrt(eps / (1 - rho))
    0.0032
    """

    rule = staticmethod(adadelta)
    variants: ClassVar = {"weight_decay": (0, 0.1)}
    on_xla: ClassVar[bool] = False
    sparse_error = "Adadelta does not support sparse gradients"

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None: ...

    def check(self, group: dict[str, Any]) -> None:
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])
        if not 0.0 <= group["rho"] <= 1.0:
            raise ValueError(f"Invalid rho value: {group['rho']}; it must be in [0, 1]")
        check_at_least_zero("epsilon value", group["eps"])
        check_at_least_zero("weight_decay value", group["weight_decay"])

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {k: group[k] for k in ("lr", "rho", "eps", "weight_decay")}

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        return {"v": "square_avg", "a": "acc_delta"}
