import pytest
import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import elu


@table("elu")
def test_elu(row, check):
    check(row)


@pytest.mark.parametrize("a", [1.5, -0.5])
def test_in_place(a):
    """With a negative slope too, which torch refuses: there the result does not tell on which side x was."""
    x = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    results = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        y = elu(leaf * 1, a, inplace)
        y = y.add_(1) if inplace else y
        results.append(torch.autograd.grad(y.square().sum() if not inplace else (y - 1).square().sum(), leaf))
    assert_close(*results)


def test_the_second_derivative_of_a_large_number_is_zero():
    x = torch.tensor([-1.0, 1e3], requires_grad=True)
    (g,) = torch.autograd.grad(elu(x).sum(), x, create_graph=True)
    assert_close(torch.autograd.grad(g.sum(), x)[0], torch.tensor([-1.0, 0.0]).exp() * torch.tensor([1.0, 0.0]))
