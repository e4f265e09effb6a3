import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import softplus


@table("softplus")
def test_softplus(row, check):
    check(row)


def test_a_high_threshold_does_not_overflow():
    """torch's value is inf: it takes exp(x) itself up to the threshold."""
    x = torch.tensor([100.0, -100.0], requires_grad=True)
    y = softplus(x, threshold=1e4)
    assert_close(y.detach(), torch.tensor([100.0, 0.0]))
    assert_close(torch.autograd.grad(y.sum(), x)[0], torch.tensor([1.0, 0.0]))


def test_derivatives_at_zero():
    """s(0) = log 2, s'(0) = 1/2, s''(0) = 1/4."""
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(softplus(x), x, create_graph=True)
    assert_close((g.item(), torch.autograd.grad(g, x)[0].item()), (0.5, 0.25))
