import pytest
import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import glu


@table("glu")
def test_glu(row, check):
    check(row)


@table("swiglu")
def test_swiglu(row, check):
    check(row)


@table("geglu")
def test_geglu(row, check):
    check(row)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_as_torchs(dim, dtype):
    """The table has its definition as the twin."""
    results = []
    for f in (glu, torch.nn.functional.glu):
        x = torch.linspace(-3, 3, 24).reshape(4, 6).to(dtype).requires_grad_()
        y = f(x, dim)
        results.append((y.detach(), *torch.autograd.grad(y, x, y.detach().cos())))
    assert_close(*results)
