"""The options that have code of their own in an optimizer, to be tried beside its defaults."""

from __future__ import annotations

from typing import Any

from torchcalc.testing.optimizers.subject import OptimizerSubject

__all__ = ["VARIANTS", "variants"]

#: Options beside the defaults that have code of their own.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"amsgrad": True},
    {"centered": True},
    {"centered": True, "momentum": 0.9},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"betas": (0.5, 0.7)},
    {"eps": 1e-3},
    {"lr_decay": 0.1},
    {"maximize": True},
)


def variants(subject: OptimizerSubject) -> list[dict[str, Any]]:
    """The variants whose options it has, on top of those given."""
    known = [dict(v) for v in VARIANTS if all(k in subject.defaults for k in v)]
    for variant in known:
        if "betas" in variant:  # as many as there are
            variant["betas"] = (*variant["betas"], 0.8, 0.9)[: len(subject.defaults["betas"])]
    fits = []
    for variant in known:
        try:
            subject.make(subject.parameters(), **variant)
        except (TypeError, ValueError, RuntimeError):
            continue
        fits.append(variant)
    return fits
