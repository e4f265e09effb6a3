"""Averaged stochastic gradient descent: steps that shrink, and the average of where they lead.

Rule, for the gradient g at step t (−g if maximize), with decay λ, weight decay w, and ηₜ, μₜ of the step:

    g ← g + w·p                                                                   (1)
    p ← p·(1 − λ·ηₜ) − ηₜ·g                                                       (2)
    a ← a + μₜ·(p − a);  a ← p while μₜ = 1                                       (3)
    η₁ = lr,  ηₜ₊₁ = lr/(1 + λ·lr·t)^α                                            (4)
    μ₁ = 1,   μₜ₊₁ = 1/max(1, t − t₀)                                             (5)

Why (3) is an average: with μ = 1/n the n-th point enters a with weight 1/n and the others keep (n − 1)/n of theirs, so that
all n have the same: a is the mean of the points after step t₀. In a valley the points of SGD scatter around the minimum,
and their mean is nearer to it than they are; it converges at the best possible rate, without second derivatives. The
average is the state ``ax``; the parameters are not averaged.

Reference: Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging", doi:10.1137/0330046; the schedule
(4) is Bottou's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from torchcalc.formula.expression import maximum
from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_finite, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT, is_recorded, live, read, to_scalar
from torchcalc.optim.tensor_list import Scalar, Vector, add_scaled, add_scaled_, as_real, choose

__all__ = ["ASGD"]


def asgd(p: Vector, g: Vector, a: Vector, *, eta: Scalar, mu: Scalar, lambd: float, weight_decay: float) -> None:
    p, g, a = as_real(p, g, a)
    if weight_decay != 0:
        g = add_scaled(g, p, weight_decay)  # (1)
    add_scaled_(p.mul_(1 - lambd * eta), g, -eta)  # (2)
    a.copy_(choose(mu >= 1, p, a.add(p.sub(a).mul_(mu))))  # (3)


@documented
class ASGD(Optimizer):
    """Averaged SGD: a drop-in for ``torch.optim.ASGD``. The average of parameter p is ``optimizer.state[p]["ax"]``.

    Args:
        lr: the first step size, a finite number >= 0 or a 1-element tensor.
        lambd: λ, pulls the weights towards 0 in (2), and with it the step shrinks in (4).
        alpha: α >= 0, the power in (4): larger, the step shrinks sooner.
        t0: t₀, the step after which the average begins.
        weight_decay: w >= 0, pulls each weight towards 0 by w·p, as a part of its gradient.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = ASGD([p], lr=0.1, lambd=0.0, t0=0)
    >>> for g in (1.0, -3.0):
    ...     p.grad = torch.tensor([g])
    ...     optimizer.step()
    >>> [round(x.item(), 4) for x in (p, optimizer.state[p]["ax"])]
    [1.2, 1.2]
    """

    rule = staticmethod(asgd)
    variants: ClassVar = {"weight_decay": (0, 0.1)}
    numbers = ("lr", "alpha", "t0")
    #: eta is the lr of the first step, which advance sets.
    scalars: ClassVar[dict[str, float]] = {"step": 0.0, "eta": 0.0, "mu": 1.0}
    sparse_error = "ASGD does not support sparse gradients"
    on_device = "params, mus, etas, and state_steps"

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None: ...

    def check(self, group: dict[str, Any]) -> None:
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])
        check_finite("lambd value", group["lambd"])
        check_at_least_zero("alpha value", group["alpha"])
        check_at_least_zero("weight_decay value", group["weight_decay"])

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"lambd": group["lambd"], "weight_decay": group["weight_decay"]}

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        return {"a": "ax"}

    def advance(
        self, state: dict[str, Any], group: dict[str, Any], hyper: dict[str, Any], first: bool
    ) -> dict[str, Any]:
        lr = live(to_scalar(group["lr"]))
        if first:
            set_(state, "eta", lr)  # (4)
        t = super().advance(state, group, hyper, first)["t"]
        eta, mu = get(state, "eta"), get(state, "mu")  # they are set below
        set_(state, "eta", lr / ((1 + group["lambd"] * lr * t) ** group["alpha"]))  # (4)
        set_(state, "mu", 1 / maximum(t - group["t0"], 1))  # (5)
        return {"eta": eta, "mu": mu}


def get(state: dict[str, Any], key: str) -> Any:
    """The number as it is now; a tensor where a derivative flows through it."""
    x = state[key] if is_recorded(state[key]) else read(state[key])
    return x.clone() if isinstance(x, Tensor) else x


def set_(state: dict[str, Any], key: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        state[key].fill_(value)
    elif is_recorded(value):  # an lr of which no derivative is taken is not to become the state, which is written
        state[key] = value
    else:
        state[key].copy_(value)
