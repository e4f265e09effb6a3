"""Operations without a second derivative, and where the tests run."""

import pytest
import torch


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
