"""The largest step before divergence, on a quadratic of known curvature.

Near a minimum a loss is quadratic, and along an eigenvector of its Hessian with eigenvalue λ an optimizer is a linear
recurrence in one number p, whose gradient is λp. It converges if and only if all roots z of its characteristic polynomial
lie in the unit circle. For z² − bz + c (Jury 1962) that is

    c < 1,   1 − b + c > 0 (no root beyond z = 1),   1 + b + c > 0 (none beyond z = −1).       (1)

The last one is what limits the step η: at the limit p changes its sign at every step and does not shrink. The largest
eigenvalue reaches its limit first, so λ is the sharpness.

SGD with momentum μ, dampening τ and weight decay ω: the gradient is a·p with a = λ + ω, and

    m ← μm + (1 − τ)·a·p,   p ← p − ηm.

Eliminating m, p₊ − p = μ(p − p₋) − η(1 − τ)a·p, that is b = 1 + μ − η(1 − τ)a and c = μ. By (1)

    η < 2(1 + μ) / ((1 − τ)·a),                                                                 (2)

which is 2/λ without momentum. Nesterov's form steps by a·p + μm instead, and m eliminated leaves
b = 1 + μ − ηa(1 + μ(1 − τ)) and c = μ(1 − ηa). By (1)

    η < 2(1 + μ) / ((1 + μ + μ(1 − τ))·a),     without dampening 2(1 + μ)/((1 + 2μ)·a).         (3)

c < 1 asks for μ < 1 in (2); Nesterov's form bears μ = 1. A dampening above 1 turns the gradient around: nothing converges.

Adam averages, m ← βm + (1 − β)g, and divides by its preconditioner P, which changes slowly: with P frozen, λ being
the sharpness of the preconditioned Hessian P^-½HP^-½, it is (2) with μ = τ = β:

    η < 2(1 + β) / ((1 − β)·λ).                                                                 (4)

AdamW also shrinks p by 1 − ηω in each step, whatever the gradient. Then b = 1 − ηω + β − η(1 − β)λ and c = β(1 − ηω):

    η < 2(1 + β) / ((1 − β)·λ + (1 + β)·ω).                                                     (5)

NAdam steps by (1 − μ)g + μm, where μ = β(1 − ½·0.96^(tψ)) rises from β/2 to β over 10⁴ steps and more: slowly enough to be
taken as it is now. With its decoupled decay b = 1 − ηω + β − η(1 − μβ)λ and c = β(1 − ηω) − ηβ(1 − μ)λ:

    η < 2(1 + β) / ((1 + β − 2μβ)·λ + (1 + β)·ω).                                               (6)

RMSprop and Adagrad are (2) with their own P.

Weight decay that is not decoupled is part of the gradient, which makes the Hessian H + ωI and the preconditioned one
P^-½HP^-½ + ωP⁻¹. By Weyl's inequality its largest eigenvalue is at most

    λ + ω/min P,                                                                                (7)

which stands for λ in (2), (4) and (6): exactly where all elements of P are equal, else on the safe side.

Groups that differ.  Let the groups have rates ρη with ρ ≤ 1, momenta and decays of their own: diagonal matrices R, M, Ω.
In z = R^-½x the recurrence has symmetric coefficients: a = λ + ω in (2) becomes A = R^½(H + Ω)R^½, and a root z with its
vector v, ‖v‖ = 1, satisfies the scalar equation with vᵀAv ≤ λ + max ω and vᵀMv ≥ min μ, which (1) holds for below the
least of the groups' limits. (5) goes the same way. So the least limit is safe, though it may be too careful: λ may belong
to another group than the largest rate does. (Not proven so: Nesterov's form with several momenta, and NAdam with several β.)

References: Polyak 1964, doi:10.1016/0041-5553(64)90137-5; Jury 1962, doi:10.1109/JRPROC.1962.288193; Cohen et al. 2021,
arXiv:2103.00065, and 2022, arXiv:2207.14484 (Adam at the edge of stability).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchcalc import optim

__all__ = ["preconditioner", "stability_limit"]

Group = Mapping[str, Any]


def _sgd(g: Group, sharpness: float, t: float) -> float:
    mu = float(g["momentum"])
    damped = 1 - float(g["dampening"]) if mu else 1.0
    if mu > 1 or (mu == 1 and not g["nesterov"]) or damped < 0 < sharpness:
        return 0.0
    if g["nesterov"]:
        return _limit(mu, sharpness * (1 + mu + mu * damped))  # (3)
    return _limit(mu, sharpness * damped)  # (2)


def _gradient_descent(g: Group, sharpness: float, t: float) -> float:
    return _limit(0.0, sharpness)


def _adam(g: Group, sharpness: float, t: float) -> float:
    beta = float(g["betas"][0])
    return _limit(beta, (1 - beta) * sharpness + (1 + beta) * _decay(g)[1])  # (4), (5)


def _nadam(g: Group, sharpness: float, t: float) -> float:
    beta = float(g["betas"][0])
    mu = beta * (1 - 0.5 * 0.96 ** ((t + 1) * g["momentum_decay"]))
    return _limit(beta, (1 + beta - 2 * mu * beta) * sharpness + (1 + beta) * _decay(g)[1])  # (6)


def _rmsprop(g: Group, sharpness: float, t: float) -> float:
    mu = float(g["momentum"])
    return 0.0 if mu >= 1 else _limit(mu, sharpness)


def _adagrad(g: Group, sharpness: float, t: float) -> float:
    return _limit(0.0, sharpness)


def _limit(momentum: float, divisor: float) -> float:
    """2(1 + μ)/divisor, where all limits have this form."""
    return 2 * (1 + momentum) / divisor if divisor > 0 else math.inf


def _decay(g: Group) -> tuple[float, float]:
    """ω as part of the gradient, and decoupled from it."""
    decay = float(g.get("weight_decay", 0.0))
    return (0.0, decay) if g.get("decoupled_weight_decay") else (decay, 0.0)


def _second_moment(g: Group, state: Mapping[str, Any]) -> Tensor:
    v = state["max_exp_avg_sq"] if g.get("amsgrad") else state["exp_avg_sq"]
    return (v / (1 - float(g["betas"][1]) ** float(state["step"]))).sqrt() + g["eps"]


def _mean_square(g: Group, state: Mapping[str, Any]) -> Tensor:
    v = state["square_avg"]
    return (v - state["grad_avg"] ** 2 if g["centered"] else v).clamp(min=0).sqrt() + g["eps"]


def _sum_of_squares(g: Group, state: Mapping[str, Any]) -> Tensor:
    """Adagrad's step also shrinks with time; the preconditioner grows by as much."""
    return (state["sum"].sqrt() + g["eps"]) * (1 + (float(state["step"]) - 1) * float(g["lr_decay"]))


_Limit = Callable[[Group, float, float], float]
_Preconditioner = Callable[[Group, Mapping[str, Any]], Tensor] | None

# What is known of each optimizer: its limit and its preconditioner, which is 1 where there is none.
_KNOWN: dict[type[torch.optim.Optimizer], tuple[_Limit, _Preconditioner]] = {
    optim.GradientDescent: (_gradient_descent, None),
    **dict.fromkeys((optim.SGD, torch.optim.SGD), (_sgd, None)),
    **dict.fromkeys((optim.Adam, optim.AdamW, torch.optim.Adam, torch.optim.AdamW), (_adam, _second_moment)),
    **dict.fromkeys((optim.NAdam, torch.optim.NAdam), (_nadam, _second_moment)),
    **dict.fromkeys((optim.RMSprop, torch.optim.RMSprop), (_rmsprop, _mean_square)),
    **dict.fromkeys((optim.Adagrad, torch.optim.Adagrad), (_adagrad, _sum_of_squares)),
}


def stability_limit(optimizer: torch.optim.Optimizer, sharpness: float) -> float:
    """The largest learning rate at which an optimizer does not diverge on a quadratic of this sharpness.

    Args:
        optimizer: GradientDescent, SGD, Adam, AdamW, NAdam, RMSprop or Adagrad, of torchcalc or torch. Its groups may
            differ: the limit, the least of theirs, is then a bound for the largest of their lr.
        sharpness: λ, the largest eigenvalue of the Hessian, without weight decay, which is accounted for here; for an
            optimizer with a preconditioner that of the preconditioned Hessian: ``curvature(..., metric=P)`` with P
            of :func:`preconditioner`. With ``maximize=True``, of the Hessian of −f.

    Returns:
        The limit, in the units of lr; inf if no step is too large for this curvature (λ <= 0), 0 if every step is (such as
        with a momentum of 1). With a preconditioner and weight decay that is not decoupled it is a bound, by (7): exact
        where P is the same everywhere, and far too careful where P is next to 0 at a parameter that is 0.

    Raises:
        TypeError: nothing is known of an optimizer of this class, or sharpness is no number. ValueError: sharpness is nan.

    Reference: Cohen et al. 2021, arXiv:2103.00065.

    >>> w = torch.nn.Parameter(torch.zeros(3))
    >>> stability_limit(torch.optim.SGD([w], lr=0.1), sharpness=10.0)  # 2/λ
    0.2
    >>> stability_limit(torch.optim.SGD([w], lr=0.1, momentum=0.9), sharpness=10.0)  # 2(1 + μ)/λ
    0.38
    """
    limit, of = _known(optimizer)
    if not isinstance(sharpness, (int, float, Tensor)):
        raise TypeError(f"sharpness: a {type(sharpness).__name__}; pass a number, such as curvature(...).value")
    if math.isnan(sharpness):
        raise ValueError("sharpness: nan; the curvature could not be measured where it was")
    steps = max((float(state["step"]) for state in optimizer.state.values() if "step" in state), default=0.0)
    limits = []
    for group in optimizer.param_groups:
        coupled, _ = _decay(group)
        if coupled and of is not None:
            smallest = min(
                (float(of(group, s).min()) for p in group["params"] if (s := _state(optimizer, p))), default=1.0
            )
            coupled = coupled / smallest if smallest > 0 else math.inf  # (7)
        limits.append(limit(group, float(sharpness) + coupled, steps))
    return min(limits)


def preconditioner(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """P of each parameter: what the optimizer divides its gradient by, in its present state.

    Args:
        optimizer: as for :func:`stability_limit`.

    Returns:
        A dict from each parameter that requires grad to a positive tensor of its shape: √v̂ + ε for Adam, AdamW and
        NAdam, √v + ε for RMSprop and Adagrad, ones for the others and where no step has been taken yet.

    Raises:
        TypeError: nothing is known of an optimizer of this class.

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.Adam([w], eps=0.0)
    >>> w.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> preconditioner(optimizer)[w].round(decimals=4)  # after one step: |g|
    tensor([3., 4.])
    """
    _, of = _known(optimizer)
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad:
                state = _state(optimizer, p)
                found[p] = (
                    of(group, state).detach().to(p.dtype) if of and state else torch.ones_like(p, requires_grad=False)
                )
    return found


def _state(optimizer: torch.optim.Optimizer, p: Tensor) -> Mapping[str, Any] | None:
    """What the optimizer remembers of a parameter, if there is any."""
    return optimizer.state.get(p) if p.requires_grad and p.numel() else None


def _known(optimizer: torch.optim.Optimizer) -> tuple[_Limit, _Preconditioner]:
    for cls in type(optimizer).__mro__:
        if cls in _KNOWN:
            return _KNOWN[cls]
    names = sorted({cls.__name__ for cls in _KNOWN})
    raise TypeError(
        f"optimizer: no stability limit is known for {type(optimizer).__name__}; known are {', '.join(names)}"
    )
