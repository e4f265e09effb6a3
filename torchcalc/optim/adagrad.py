"""Adagrad: divide each weight's gradient by the root of the sum of all its squares so far.

Rule, for the gradient g at step t (−g if maximize), with weight decay λ, decay η of the step size lr:

    g ← g + λ·p                                                                   (1)
    s ← s + g²                                                                    (2)
    p ← p − lr/(1 + (t − 1)·η) · g/(√s + ε)                                       (3)

A weight whose gradient is rare keeps a large step, one whose gradient is frequent slows down as 1/√t. A sparse gradient
touches only its own rows: with duplicate indices summed first, since (2) is not linear.

Reference: Duchi, Hazan, Singer 2011, JMLR 12, 2121-2159.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_implementation, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT, new_step
from torchcalc.optim.tensor_list import Scalar, Vector, add_ratio_, add_scaled, as_real

__all__ = ["Adagrad"]


def adagrad(
    p: Vector, g: Vector, s: Vector, *, t: Scalar, lr: Scalar, lr_decay: float, eps: float, weight_decay: float
) -> None:
    if weight_decay != 0:
        g = add_scaled(g, p, weight_decay)  # (1)
    p, g, s = as_real(p, g, s)
    s.addcmul_(g, g)  # (2)
    add_ratio_(p, g, s.sqrt().add_(eps), -(lr / (1 + (t - 1) * lr_decay)))  # (3)


def adagrad_sparse(
    p: Tensor, g: Tensor, s: Tensor, *, t: Scalar, lr: Scalar, lr_decay: float, eps: float, weight_decay: float
) -> None:
    g = g.coalesce()  # without weight decay: refused below

    def like_g(values: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(g.indices(), values, g.size(), is_coalesced=True, check_invariants=False)

    s.add_(like_g(g.values().pow(2)))  # (2)
    root = s.sparse_mask(g).values().sqrt().add_(eps)
    p.add_(like_g(g.values() / root), alpha=-(lr / (1 + (t - 1) * lr_decay)))  # (3)


@documented
class Adagrad(Optimizer):
    """Adagrad: a drop-in for ``torch.optim.Adagrad``; sparse gradients welcome.

    Args:
        lr_decay: η >= 0, divides lr by 1 + (t - 1)·η at step t.
        weight_decay: λ >= 0, pulls each weight towards 0 by λ·p, as a part of its gradient.
        initial_accumulator_value: what s starts from, >= 0; larger, the first steps are smaller.
        eps: ε >= 0, keeps the step finite where a weight has seen no gradient.

    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Adagrad([p], lr=0.1)
    >>> p.grad = torch.tensor([5.0])
    >>> optimizer.step()
    >>> round(p.item(), 4)  # the first step is lr
    0.9
    """

    rule = staticmethod(adagrad)
    variants: ClassVar = {"weight_decay": (0, 0.1)}
    sparse_rule = staticmethod(adagrad_sparse)

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None:
        for group in self.param_groups:  # as torch does, so that share_memory has what to share before the first step
            for p in group["params"]:
                self.state[p] = {"step": new_step(p, group), "sum": self.new_slot("sum", p, p, group)}

    def share_memory(self) -> None:
        """Move the sums into shared memory, for Hogwild training."""
        for state in self.state.values():
            state["sum"].share_memory_()

    def torch_fused(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        slots: list[list[Tensor]],
        steps: list[Tensor],
        group: dict[str, Any],
        first: bool,
    ) -> None:
        torch._fused_adagrad_(
            params,
            grads,
            slots[0],
            steps,
            lr=float(group["lr"]),
            lr_decay=group["lr_decay"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def check(self, group: dict[str, Any]) -> None:
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])
        check_at_least_zero("lr_decay value", group["lr_decay"])
        check_at_least_zero("weight_decay value", group["weight_decay"])
        check_at_least_zero("initial_accumulator_value value", group["initial_accumulator_value"])
        check_at_least_zero("epsilon value", group["eps"])
        check_implementation(group)

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {k: group[k] for k in ("lr", "lr_decay", "eps", "weight_decay")}

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        return {"s": "sum"}

    def refuses_sparse(self, group: dict[str, Any]) -> str:
        if group["weight_decay"] != 0:
            return "weight_decay option is not compatible with sparse gradients; pass weight_decay=0"
        return super().refuses_sparse(group)

    def new_slot(self, key: str, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        start = group["initial_accumulator_value"]
        return torch.full_like(
            p, complex(start, start) if p.is_complex() else start, memory_format=torch.preserve_format
        )
