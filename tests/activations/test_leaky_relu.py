import pytest
import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import leaky_relu


@table("leaky_relu")
def test_leaky_relu(row, check):
    check(row)


@pytest.mark.parametrize("a", [1.5, -0.5])
def test_in_place(a):
    """With a negative slope too, which torch refuses: there the result does not tell on which side x was."""
    x = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    results = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        y = leaky_relu(leaf * 1, a, inplace)
        results.append(torch.autograd.grad(y.square().sum(), leaf))
    assert_close(*results)
