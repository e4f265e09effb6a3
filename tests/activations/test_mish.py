import mpmath
import pytest
import torch

from tests.functions import table
from torchcalc.functional import mish


@table("mish")
def test_mish(row, check):
    check(row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_tails(dtype):
    """To a few units in the last place where tanh and the logarithm lose digits."""
    for at in (-80.0, -30.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 30.0, 80.0):
        x = torch.tensor(at, dtype=dtype, requires_grad=True)
        y = mish(x * 1)
        (g,) = torch.autograd.grad(y, x)
        f = lambda v: v * mpmath.tanh(mpmath.log1p(mpmath.exp(v)))  # noqa: E731
        with mpmath.workdps(80):
            value, slope = f(mpmath.mpf(x.item())), mpmath.diff(f, x.item())
            assert abs(g.item() - slope) <= 8 * torch.finfo(dtype).eps * abs(slope)
            assert abs(y.item() - value) <= 8 * torch.finfo(dtype).eps * abs(value)
