"""Random numbers that leave no trace: of torch, of Python and, where it is in use, of NumPy."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["random_numbers_kept"]


@contextmanager
def random_numbers_kept(seed: int | None = None, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Inside, the random numbers of a seed, or, without one, those that come; afterwards all generators stand where they stood.

    Args:
        seed: of all generators; None leaves them as they are.
        devices: whose generators to keep, besides that of the CPU.
    """
    numpy = sys.modules.get("numpy")
    with ExitStack() as stack:
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        stack.callback(random.setstate, random.getstate())
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        for device in {d for d in devices if d.type not in ("cpu", "meta")}:
            module = torch.get_device_module(device)
            stack.callback(module.set_rng_state, module.get_rng_state(device), device)
            if seed is not None:
                with module.device(device):
                    module.manual_seed(seed)
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed % 2**32)
        yield
