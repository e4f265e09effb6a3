"""The state of every random generator that training draws from, in tensors and numbers that ``weights_only=True`` loads."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch

__all__ = ["rng_state", "seed_of", "seeded", "set_rng_state"]


def rng_state(*, devices: bool = True) -> dict[str, Any]:
    """Return the states of the generators of torch, of CUDA where it is in use, of NumPy where it is imported, and of Python.

    Args:
        devices: False leaves CUDA's out.

    Returns:
        A dict of tensors, numbers and strings for :func:`set_rng_state`, or for a checkpoint.

    >>> import torch
    >>> state = rng_state()
    >>> first = torch.rand(2)
    >>> set_rng_state(state)
    >>> bool((torch.rand(2) == first).all())
    True
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if devices and torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        from numpy.random import get_state

        name, keys, *rest = cast(tuple[Any, ...], get_state())
        state["numpy"] = (str(name), torch.from_numpy(keys.astype("int64")), *map(float, rest))
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put every generator that ``state`` knows where it was.

    Args:
        state: what :func:`rng_state` returned, perhaps saved and loaded since. Devices that are missing here are left out.

    Raises:
        KeyError: ``state`` is not of :func:`rng_state`.

    >>> state = rng_state()
    >>> first = random.random()
    >>> set_rng_state(state)
    >>> random.random() == first
    True
    """
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        for device, each in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(each.cpu(), device)
    if "numpy" in state:
        from numpy.random import set_state

        name, keys, position, has_gauss, cached = state["numpy"]
        set_state((name, keys.numpy().astype("uint32"), int(position), int(has_gauss), cached))


def seed_of(*numbers: int) -> int:
    """Return a seed below 2⁶³ of its own for every tuple of integers: (0, 1) and (1, 0) have nothing in common.

    >>> seed_of(0, 1) == seed_of(0, 1), seed_of(0, 1) == seed_of(1, 0)
    (True, False)
    """
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run what is inside with generators of this seed: torch's on the CPU, NumPy's and Python's; then put them back."""
    before = rng_state(devices=False)
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the devices as well
        random.seed(seed)
        if "numpy" in sys.modules:
            from numpy.random import seed as seed_numpy

            seed_numpy(seed % 2**32)
        yield
    finally:
        set_rng_state(before)
