"""Random numbers that leave no trace: of torch, of Python and, where it is in use, of NumPy."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["RandomNumbers", "random_numbers_kept"]


class RandomNumbers:
    """Where all generators stand, so that they can be put back there.

    Args:
        devices: whose generators to keep, besides that of the CPU.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self.numpy = sys.modules.get("numpy")
        self.host, self.python = torch.get_rng_state(), random.getstate()
        self.array = self.numpy.random.get_state() if self.numpy is not None else None
        self.devices = {
            d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        if self.numpy is not None:
            self.numpy.random.set_state(self.array)
        random.setstate(self.python)
        torch.set_rng_state(self.host)

    def seed(self, seed: int) -> None:
        """Let all of them begin with a seed."""
        for device in self.devices:
            module = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if self.numpy is not None:
            self.numpy.random.seed(seed % 2**32)


@contextmanager
def random_numbers_kept(seed: int | None = None, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Inside, the random numbers of a seed, or, without one, those that come; afterwards all generators stand where they stood.

    Args:
        seed: of all generators; None leaves them as they are.
        devices: whose generators to keep, besides that of the CPU.
    """
    kept = RandomNumbers(devices)
    try:
        if seed is not None:
            kept.seed(seed)
        yield
    finally:
        kept.restore()
