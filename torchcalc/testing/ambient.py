"""What surrounds a call: the generators and the flags of the process. A subject leaves them alone, and so do the checks."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["FLAGS", "GENERATORS", "changes", "kept", "seeds", "taken"]


def _numpy() -> Any:
    return sys.modules.get("numpy")  # what is not imported cannot have been used


def _cuda_state() -> Any:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None


def _numpy_state() -> Any:
    np = _numpy()
    return None if np is None else np.random.get_state()


def _set_numpy_state(state: Any) -> None:
    if state is not None:
        _numpy().random.set_state(state)


def _set_cuda_state(state: Any) -> None:
    if state is not None:
        torch.cuda.set_rng_state_all(state)


Pair = tuple[Callable[[], Any], Callable[[Any], Any]]

#: {name: (get, set)} of the generators that a call may draw from.
GENERATORS: dict[str, Pair] = {
    "torch's generator": (torch.get_rng_state, torch.set_rng_state),
    "torch's CUDA generators": (_cuda_state, _set_cuda_state),
    "Python's generator": (random.getstate, random.setstate),
    "NumPy's generator": (_numpy_state, _set_numpy_state),
}
#: {name: (get, set)} of flags that are global.
FLAGS: dict[str, Pair] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda x: torch.use_deterministic_algorithms(x[0], warn_only=x[1]),
    ),
    "anomaly mode": (torch.is_anomaly_enabled, lambda x: torch.autograd.set_detect_anomaly(x)),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn.benchmark": (lambda: torch.backends.cudnn.benchmark, lambda x: setattr(torch.backends.cudnn, "benchmark", x)),
    "cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic, lambda x: setattr(torch.backends.cudnn, "deterministic", x),
    ),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's warn_always": (torch.is_warn_always_enabled, torch.set_warn_always),
    "flush_denormal": (lambda: bool(torch.tensor(1e-310, dtype=torch.float64, device="cpu") == 0), torch.set_flush_denormal),
    "NumPy's error state": (
        lambda: None if _numpy() is None else _numpy().geterr(),
        lambda x: None if x is None else _numpy().seterr(**x),
    ),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
}  # fmt: skip


def taken(table: dict[str, Pair]) -> dict[str, Any]:
    """What the entries of a table are now."""
    return {name: get() for name, (get, _) in table.items()}


def changes(before: dict[str, Any], table: dict[str, Pair]) -> list[str]:
    """Names of the entries that are not as they were."""
    return [name for name, old in before.items() if not _equal(old, table[name][0]())]


def put_back(before: dict[str, Any], table: dict[str, Pair]) -> None:
    """Set what is not as it was."""
    for name in changes(before, table):
        table[name][1](before[name])


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, tuple | list) and isinstance(y, tuple | list):
        return len(x) == len(y) and all(map(_equal, x, y))
    if hasattr(x, "tobytes") and hasattr(y, "tobytes"):
        return bool(x.tobytes() == y.tobytes())
    return bool(x == y)


def seeds(seed: int) -> None:
    """Seed torch's CPU generator, Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend, slowly
    random.seed(seed)
    if _numpy() is not None:
        _numpy().random.seed(seed)


@contextlib.contextmanager
def kept(*tables: dict[str, Pair]) -> Iterator[None]:
    """What the tables name (default: generators and flags) is afterwards as it was."""
    before = [(taken(table), table) for table in tables or (GENERATORS, FLAGS)]
    try:
        yield
    finally:
        for values, table in reversed(before):
            put_back(values, table)
