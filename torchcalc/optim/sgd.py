"""Stochastic gradient descent, with momentum.

Rule, for the gradient g of the loss at p (−g if maximize), with weight decay λ, momentum μ, dampening τ, step size lr:

    g ← g + λ·p                        the gradient of loss + λ/2·‖p‖²            (1)
    b ← g            at a parameter's first step
    b ← μ·b + (1 − τ)·g   afterwards   a running sum of past gradients            (2)
    d = b, or g + μ·b with nesterov    b looked at one step ahead                 (3)
    p ← p − lr·d                                                                  (4)

Where it differs from the literature, as torch.optim does: lr multiplies the sum (4) and is not inside it, so that
changing lr rescales past gradients too; the first b is g itself, undamped.

References: Polyak 1964, doi:10.1016/0041-5553(64)90137-5 (momentum); Sutskever et al. 2013, ICML (nesterov).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchcalc.native.optim import Bound
from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_finite, check_implementation, check_one_element
from torchcalc.optim.extras import Scaling
from torchcalc.optim.optimizer import Optimizer, ParamsT
from torchcalc.optim.tensor_list import Scalar, Vector, add_scaled, add_scaled_

__all__ = ["SGD"]


def sgd(
    p: Vector,
    g: Vector,
    b: Vector | None = None,
    *,
    first: bool,
    lr: Scalar,
    momentum: float,
    dampening: float,
    weight_decay: Scalar,
    nesterov: bool,
) -> None:
    if _nonzero(weight_decay):
        g = add_scaled(g, p, weight_decay)  # (1)
    if b is not None:
        if first:
            b.copy_(g)
        else:
            b.mul_(momentum).add_(g, alpha=1 - dampening)  # (2)
        g = g.add(b, alpha=momentum) if nesterov else b  # (3)
    add_scaled_(p, g, -lr)  # (4)


def _nonzero(x: Scalar) -> bool:
    return bool(isinstance(x, Tensor) or x != 0)


@documented
class SGD(Optimizer):
    """SGD with momentum, dampening, Nesterov and weight decay: a drop-in for ``torch.optim.SGD``.

    Args:
        momentum: μ >= 0, what the sum of past gradients keeps at each step: near 1 it averages over some 1/(1 - μ) of them; 0
            keeps no state.
        dampening: τ, the part of each new gradient that the sum leaves out.
        weight_decay: λ >= 0, a number or a 1-element tensor: pulls each weight towards 0 by λ·p, as a part of its gradient.
        nesterov: look one step ahead; needs momentum > 0 and dampening 0.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = SGD([p], lr=0.1)
    >>> p.grad = torch.tensor([2.0])
    >>> optimizer.step()
    >>> p.item()  # 1 - 0.1 * 2
    0.800000011920929
    """

    rule = staticmethod(sgd)
    variants: ClassVar = {"weight_decay": (0, 0.1), "momentum": (0, 0.9), "nesterov": (False, True)}
    sparse_rule = staticmethod(sgd)
    counts_steps: ClassVar[bool] = False
    added_later: ClassVar[dict[str, Any]] = {"nesterov": False, "maximize": False, "foreach": None}

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None: ...

    def native(
        self, bound: Bound, grads: list[Tensor], group: dict[str, Any], first: list[int], scaling: Scaling
    ) -> int:
        return bound.sgd_(
            grads,
            first=first,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
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
        torch._fused_sgd_(
            params,
            grads,
            slots[0] if slots else [],
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=first,
        )

    def check(self, group: dict[str, Any]) -> None:
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])
        check_at_least_zero("momentum value", group["momentum"])
        check_at_least_zero("weight_decay value", group["weight_decay"])
        check_finite("dampening value", group["dampening"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "Nesterov momentum requires a momentum and zero dampening, but momentum is "
                f"{group['momentum']} and dampening {group['dampening']}; pass e.g. momentum=0.9, dampening=0"
            )
        check_implementation(group)

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {k: group[k] for k in ("lr", "momentum", "dampening", "weight_decay", "nesterov")}

    def advance(
        self, state: dict[str, Any], group: dict[str, Any], hyper: dict[str, Any], first: bool
    ) -> dict[str, Any]:
        return {"first": first}

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        return {"b": "momentum_buffer"} if group["momentum"] != 0 else {}

    def new_slot(self, key: str, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        return torch.zeros_like(
            g.detach()
        )  # sgd fills it; as in torch it has the gradient's layout, sparse ones included
