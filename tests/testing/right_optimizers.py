"""Right but unusual optimizers: check_optimizer must find no error in any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.testing.right_coupled import (
    LAMB,
    LARS,
    SAM,
    BlockQuantized,
    Cautious,
    Centralized,
    DAdaptation,
    Greedy,
    Lookahead,
    LowRank,
    NormalizedGD,
    PolyakStep,
    Private,
    Shampoo,
)
from tests.testing.right_elementwise import (
    SGLD,
    Accumulates,
    AdaBelief,
    Clamped,
    Flat,
    KeepsZeros,
    MasterWeights,
    OnlyFloat32,
    OwnNoise,
    Proximal,
    RelativeStep,
    ScheduleFree,
    SignSGD,
    WarmsUp,
    WeightAverage,
    Yogi,
)

__all__ = ["UNUSUAL"]


def _train(optimizer: Any) -> None:
    optimizer.train()


Made = type("Made", (torch.optim.SGD,), {"__doc__": "A class made by type(): pickle does not find it."})


def own_groups(params: Any) -> torch.optim.Optimizer:
    """A factory that says itself which options its parameters have."""
    return torch.optim.SGD([{"params": list(params), "lr": 0.1}], lr=0.2, foreach=False)


#: (class, options, prepare)
UNUSUAL: tuple[tuple[Any, dict[str, Any], Callable[[Any], None] | None], ...] = (
    *((cls, {}, None) for cls in (
        SGLD, KeepsZeros, LARS, LAMB, Shampoo, Lookahead, SAM, SignSGD, NormalizedGD, AdaBelief, Yogi, Cautious,
        Clamped, Centralized, DAdaptation, WeightAverage, Accumulates, WarmsUp, Greedy, BlockQuantized, Flat,
        PolyakStep, RelativeStep, OnlyFloat32, MasterWeights, Private, OwnNoise, LowRank, Proximal,
    )),
    (ScheduleFree, {}, _train),
    (Made, dict(foreach=False), None),
    (own_groups, {}, None),
    (torch.optim.Adafactor, dict(foreach=False), None),
    (torch.optim.Muon, {}, None),
    (torch.optim.Rprop, dict(foreach=False), None),
)  # fmt: skip
