"""Parameters, gradients, and the memory they stand in."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "SHAPES",
    "Grads",
    "Play",
    "clone",
    "gradients",
    "parameters",
    "poisoned",
    "restored",
    "set_gradients",
    "snapshot",
]

#: One entry per step: a gradient, or None, per parameter.
Grads = list[list[Tensor | None]]
#: The values of all parameters, before the first step and after each.
Play = list[list[Tensor]]

SHAPES: tuple[tuple[int, ...], ...] = ((3, 4), (5,), (2, 3, 2, 3))


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[nn.Parameter]:
    """Standard normal parameters, drawn in float64, so that those of different dtypes agree."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=wide).to(dtype)) for s in shapes]


def gradients(like: Sequence[Tensor], steps: int, seed: int = 1) -> Grads:
    """Gradients of all parameters for every step."""
    generator = torch.Generator().manual_seed(seed)

    def one(p: Tensor) -> Tensor:
        wide = torch.complex128 if p.is_complex() else torch.float64
        return torch.randn(p.shape, generator=generator, dtype=wide).to(p.dtype)

    return [[one(p) for p in like] for _ in range(steps)]


def set_gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Every parameter gets a copy of its gradient."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


def clone(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch leaves uninitialised is filled with nan, so that reading it shows every time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """All that a step may change, copied."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, copy.deepcopy(optimizer.state_dict())


def restored(x: Any) -> Any:
    """What torch.save writes and torch.load reads."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
