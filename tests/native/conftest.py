"""The kernels are what is tested here: without a compiler these tests are skipped, otherwise the library must load."""

from collections.abc import Iterator

import pytest
import torch

from torchcalc import native
from torchcalc.native import build


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    if not native.available():
        try:
            build.compiler()
        except build.BuildError as error:
            pytest.skip(str(error))
        pytest.fail(native.why_not())


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
