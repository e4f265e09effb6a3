"""Textbook rules in float64, each with its classic slips: the slip that reproduces a wrong optimizer is its diagnosis.

A rule is ``rule(p, gradients, slip, **hyper) -> [p after each step]``; slip "" is the textbook.

References: Kingma, Ba 2015 (Adam); Loshchilov, Hutter 2019 (AdamW); Sutskever et al. 2013 (SGD); Graves 2013 (RMSprop);
Duchi et al. 2011 (Adagrad); Chen et al. 2023 (Lion).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["FAMILIES", "explanations"]

SGD_SLIPS = (
    "dampening applied to the first step",
    "dampening ignored",
    "nesterov without the gradient's own part",
    "weight decay decoupled instead of coupled",
    "momentum averages (1 − μ) instead of summing",
    "lr inside the momentum sum",
    "lr applied twice",
    "weight decay scaled by lr twice",
)
ADAM_SLIPS = (
    "bias correction missing",
    "bias correction of the first average missing",
    "bias correction of the second average missing",
    "bias correction off by one: step counted too early",
    "bias correction off by one: step counted too late",
    "epsilon inside the root",
    "epsilon added before the bias correction",
    "weight decay coupled instead of decoupled",
    "weight decay decoupled instead of coupled",
    "weight decay not scaled by lr",
    "weight decay after the step instead of before",
    "weight decay ignored",
    "betas swapped",
    "beta and 1 − beta swapped",
    "second average of the decayed gradient only",
    "second average updated after use",
    "first average updated after use",
    "second average without the root",
    "lr applied twice",
    "amsgrad takes the maximum of the corrected average",
)
RMSPROP_SLIPS = (
    "epsilon inside the root",
    "alpha and 1 − alpha swapped",
    "square average updated after use",
    "lr applied twice",
)
ADAGRAD_SLIPS = ("epsilon inside the root", "sum updated after use", "lr decay off by one", "lr applied twice")
LION_SLIPS = ("betas swapped", "momentum updated before use", "weight decay not scaled by lr", "lr applied twice")


def sgd(
    p: Tensor, gradients: Sequence[Tensor], slip: str, *, lr: float, momentum: float = 0.0, dampening: float = 0.0,
    weight_decay: float = 0.0, nesterov: bool = False, maximize: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    b: Tensor | None = None
    decoupled = slip == "weight decay decoupled instead of coupled"
    for g in gradients:
        g = -g if maximize else g
        decay = weight_decay * (lr if slip == "weight decay scaled by lr twice" else 1)
        if decoupled:
            p = p * (1 - lr * weight_decay)
        else:
            g = g + decay * p
        keep = 1.0 if slip == "dampening ignored" else 1 - dampening
        keep = 1 - momentum if slip.startswith("momentum averages") else keep
        used = g * lr if slip == "lr inside the momentum sum" else g
        if b is None:
            first = slip in ("dampening applied to the first step", "momentum averages (1 − μ) instead of summing")
            b = used * (keep if first else 1)
        else:
            b = momentum * b + keep * used
        d = b if momentum else used
        if nesterov and slip == "nesterov without the gradient's own part":
            d = momentum * b
        elif nesterov:
            d = used + momentum * b
        rate = lr * lr if slip == "lr applied twice" else 1 if slip == "lr inside the momentum sum" else lr
        p = p - rate * d
        yield p


def adam(
    p: Tensor, gradients: Sequence[Tensor], slip: str, *, lr: float, betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8, weight_decay: float = 0.0, amsgrad: bool = False, maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    b1, b2 = (betas[1], betas[0]) if slip == "betas swapped" else betas
    decoupled = decoupled_weight_decay != (slip in ADAM_SLIPS[7:9])
    m, v, top = 0 * p, 0 * p, 0 * p
    for t, g in enumerate(gradients, 1):
        g = -g if maximize else g
        raw = g
        decay = 0.0 if slip == "weight decay ignored" else weight_decay
        shrink = 1 - decay * (1 if slip == "weight decay not scaled by lr" else lr)
        if not decoupled:
            g = g + decay * p
        elif slip != "weight decay after the step instead of before":
            p = p * shrink
        k1, k2 = (1 - b1, 1 - b2) if slip == "beta and 1 − beta swapped" else (b1, b2)
        old_m, old_v = m, v
        m = k1 * m + (1 - k1) * g
        squared = raw if slip == "second average of the decayed gradient only" else g
        v = k2 * v + (1 - k2) * squared * squared
        m_used = old_m if slip == "first average updated after use" else m
        v_used = old_v if slip == "second average updated after use" else v
        at = t + 1 if slip.endswith("too early") else max(t - 1, 1) if slip.endswith("too late") else t
        c1 = 1.0 if slip in ADAM_SLIPS[:2] else 1 - b1**at
        c2 = 1.0 if slip in (ADAM_SLIPS[0], ADAM_SLIPS[2]) else 1 - b2**at
        if amsgrad and slip.startswith("amsgrad takes"):
            top = top.maximum(v_used / c2)
            v_used = top * c2
        elif amsgrad:
            top = top.maximum(v_used)
            v_used = top
        if slip == "epsilon inside the root":
            root = (v_used / c2 + eps).sqrt()
        elif slip == "epsilon added before the bias correction":
            root = (v_used.sqrt() + eps) / c2**0.5
        elif slip == "second average without the root":
            root = v_used / c2 + eps
        else:
            root = (v_used / c2).sqrt() + eps
        p = p - (lr * lr if slip == "lr applied twice" else lr) * (m_used / c1) / root
        if decoupled and slip == "weight decay after the step instead of before":
            p = p * shrink
        yield p


def adamw(p: Tensor, gradients: Sequence[Tensor], slip: str, **hyper: Any) -> Iterator[Tensor]:
    return adam(p, gradients, slip, **{**hyper, "decoupled_weight_decay": True})


def rmsprop(
    p: Tensor, gradients: Sequence[Tensor], slip: str, *, lr: float, alpha: float = 0.99, eps: float = 1e-8,
    weight_decay: float = 0.0, maximize: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    v = 0 * p
    alpha = 1 - alpha if slip == "alpha and 1 − alpha swapped" else alpha
    for g in gradients:
        g = (-g if maximize else g) + weight_decay * p
        old, v = v, alpha * v + (1 - alpha) * g * g
        used = old if slip == "square average updated after use" else v
        root = (used + eps).sqrt() if slip == "epsilon inside the root" else used.sqrt() + eps
        p = p - (lr * lr if slip == "lr applied twice" else lr) * g / root
        yield p


def adagrad(
    p: Tensor, gradients: Sequence[Tensor], slip: str, *, lr: float, lr_decay: float = 0.0, eps: float = 1e-10,
    weight_decay: float = 0.0, initial_accumulator_value: float = 0.0, maximize: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    s = 0 * p + initial_accumulator_value
    for t, g in enumerate(gradients, 1):
        g = (-g if maximize else g) + weight_decay * p
        old, s = s, s + g * g
        used = old if slip == "sum updated after use" else s
        root = (used + eps).sqrt() if slip == "epsilon inside the root" else used.sqrt() + eps
        rate = lr / (1 + (t if slip == "lr decay off by one" else t - 1) * lr_decay)
        p = p - (lr * rate if slip == "lr applied twice" else rate) * g / root
        yield p


def lion(
    p: Tensor, gradients: Sequence[Tensor], slip: str, *, lr: float, betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0, maximize: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    b1, b2 = (betas[1], betas[0]) if slip == "betas swapped" else betas
    m = 0 * p
    for g in gradients:
        g = -g if maximize else g
        new = b2 * m + (1 - b2) * g
        c = b1 * (new if slip == "momentum updated before use" else m) + (1 - b1) * g
        p = p - lr * weight_decay * p if slip != "weight decay not scaled by lr" else p - weight_decay * p
        p, m = p - (lr * lr if slip == "lr applied twice" else lr) * c.sign(), new
        yield p


Rule = Callable[..., Iterator[Tensor]]
FAMILIES: tuple[tuple[str, Rule, tuple[str, ...]], ...] = (
    ("SGD", sgd, SGD_SLIPS),
    ("Adam", adam, ADAM_SLIPS),
    ("AdamW", adamw, ADAM_SLIPS),
    ("RMSprop", rmsprop, RMSPROP_SLIPS),
    ("Adagrad", adagrad, ADAGRAD_SLIPS),
    ("Lion", lion, LION_SLIPS),
)


def explanations(
    starts: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], hyper: dict[str, Any]
) -> Iterator[tuple[str, str, list[list[Tensor]]]]:
    """(family, slip, run) for every rule that takes these hyperparameters; the textbook, slip "", first."""
    for family, rule, slips in FAMILIES:
        takes = inspect.signature(adam if rule is adamw else rule).parameters
        known = {k: v for k, v in hyper.items() if k in takes}
        for slip in ("", *slips):
            try:
                columns = [[p, *rule(p, [step[i] for step in grads], slip, **known)] for i, p in enumerate(starts)]
            except (TypeError, ZeroDivisionError, ValueError):
                continue
            yield family, slip, [list(row) for row in zip(*columns, strict=True)]
