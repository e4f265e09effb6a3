import pytest
import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import kl_div


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's kl_div under vmap
@table("kl_div")
def test_kl_div(row, check):
    check(row)


inf = torch.inf


@pytest.mark.parametrize("log_target", [False, True])
def test_what_does_not_happen_costs_nothing(log_target):
    """0·log 0 = 0, whatever was predicted; what does and was thought impossible costs everything."""
    target = torch.tensor([0.0, 0.0, 1.0, 0.5])
    x = torch.tensor([-inf, -1.0, -inf, -1.0], requires_grad=True)
    y = kl_div(x, target.log() if log_target else target, reduction="none", log_target=log_target)
    assert_close(y.detach(), torch.tensor([0.0, 0.0, inf, 0.5 * (1 - torch.tensor(2.0).log().item())]))
    assert_close(torch.autograd.grad(y.sum(), x)[0], -target)


@pytest.mark.parametrize("shapes", [((3, 1), (4,)), ((4,), (3, 1)), ((3, 4), (4,))])
@pytest.mark.parametrize("reduction", ["sum", "batchmean", "none"])
def test_broadcast(shapes, reduction):
    """∂ℓ/∂x = -t uses the target alone, and is summed over what x was repeated for."""
    torch.manual_seed(0)
    inputs = [torch.rand(s, dtype=torch.float64) + 0.1 for s in shapes]
    results = []
    for f in (kl_div, torch.nn.functional.kl_div):
        leaves = [x.clone().requires_grad_() for x in inputs]
        results.append(torch.autograd.grad(f(*leaves, reduction=reduction).sum(), leaves))
    assert_close(*results)


def test_batchmean_of_halves_is_rounded_once():
    x = torch.full((4, 4096), -9.0, dtype=torch.float16)
    t = torch.full((4, 4096), 1.0, dtype=torch.float16)
    y = kl_div(x, t, reduction="batchmean")  # the sum is 147456, which float16 does not have
    assert y.dtype is torch.float16
    assert y.item() == 9 * 4096
