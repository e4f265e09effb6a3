import pytest
import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import gaussian_nll_loss


@table("gaussian_nll_loss")
def test_gaussian_nll_loss(row, check):
    check(row)


@pytest.mark.parametrize("var", [0.3, "full", "row", "short", "below eps"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_as_torchs(var, reduction):
    """The table has torch's distribution as the twin. Below eps the gradient of the variance is that at eps."""
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    shapes = {"full": (2, 3, 4), "row": (2, 1, 4), "short": (2, 3), "below eps": (2, 3, 4)}
    v = var if isinstance(var, float) else torch.rand(shapes[var]).double() * (0.1 if var == "below eps" else 1)
    results = []
    for f in (gaussian_nll_loss, torch.nn.functional.gaussian_nll_loss):
        leaves = [a.clone().requires_grad_() for a in (x, t, v) if isinstance(a, torch.Tensor)]
        y = f(*leaves, *([] if len(leaves) == 3 else [v]), full=True, eps=0.05, reduction=reduction)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), leaves)))
    assert_close(*results)


def test_under_autocast_it_is_computed_in_float32():
    x = torch.ones(3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert gaussian_nll_loss(x, x, x).dtype is torch.float32
