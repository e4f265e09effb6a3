"""What every test starts from."""

import os
from collections.abc import Iterator

import pytest
import torch

# The first backward decides for how many devices autograd starts threads, which no fork survives. FakeTensorMode makes torch
# believe in one: so it is here, and not in a test that compiles.
torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """The same numbers for every test, and none that leaves to the next a device, a dtype or a mode."""
    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)  # which seed_everything leaves there, for the samplers of later trainings
    before = surroundings()
    yield
    assert surroundings() == before


def surroundings() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
        torch._C._len_torch_function_stack(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many small tensors, which several threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
