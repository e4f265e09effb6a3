import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import poisson_nll_loss


@table("poisson_nll_loss")
def test_poisson_nll_loss(row, check):
    check(row)


def test_no_count_at_no_rate_costs_nothing():
    zero = torch.zeros(1)
    assert poisson_nll_loss(torch.tensor([-torch.inf]), zero).item() == 0
    assert poisson_nll_loss(zero, zero, log_input=False, eps=0.0).item() == 0
    assert poisson_nll_loss(zero, zero + 1, log_input=False, eps=0.0).item() == torch.inf


def test_mixed_second_derivative_at_a_count_of_zero():
    """∂²ℓ/∂x∂t = -1: that 0·∞ = 0 must not hide it."""
    x = torch.tensor(0.7, requires_grad=True)
    t = torch.tensor(0.0, requires_grad=True)
    (by_t,) = torch.autograd.grad(poisson_nll_loss(x, t), t, create_graph=True)
    assert_close(torch.autograd.grad(by_t, x)[0], torch.tensor(-1.0))


def test_stirling_of_few_counts_is_left_out():
    t = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    y = poisson_nll_loss(torch.zeros(3), t, full=True, reduction="none")
    expected = torch.nn.functional.poisson_nll_loss(torch.zeros(3), t.detach(), full=True, reduction="none")
    assert_close(y.detach(), expected)
    (g,) = torch.autograd.grad(y.sum(), t, create_graph=True)
    assert g.isfinite().all()
    assert torch.autograd.grad(g.sum(), t)[0].isfinite().all()


def test_integers_are_counts():
    assert_close(
        poisson_nll_loss(torch.ones(2), torch.tensor([1, 3])), poisson_nll_loss(torch.ones(2), torch.tensor([1.0, 3.0]))
    )
