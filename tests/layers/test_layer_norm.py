from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchcalc.functional as ours
from tests import checks
from tests.functions import LAYERS, normal, table


@table("layer_norm")
def test_layer_norm(row, check):
    check(row)


@pytest.mark.parametrize("check", [checks.values, checks.first_derivatives, checks.autocast, checks.autocast_of_cuda])
def test_as_torch_where_that_is_right(check):
    row = next(row for row in LAYERS if row.name == "layer_norm")
    check(replace(row, stock=lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)))


def hessians(f, x, b):
    return torch.autograd.functional.hessian(lambda x, b: f(x, [4], None, b).sin().sum(), (x, b))


def test_second_derivatives_of_a_bias_alone():
    """torch 2.13 leaves out those of bias and input; which are transposed to those of input and bias, and not zero."""
    (_, x_b), (b_x, _) = hessians(ours.layer_norm, normal(3, 4), normal(4, seed=1))
    assert_close(b_x, x_b.permute(2, 0, 1))
    assert b_x.abs().max() > 0.1


def test_the_hessian_is_symmetric():
    """torch 2.13's is not, by torch.func.hessian, between weight and input."""
    call = lambda x, w: ours.layer_norm(x, [4], w).sin().sum()  # noqa: E731
    (_, x_w), (w_x, _) = torch.func.hessian(call, (0, 1))(normal(3, 4), normal(4, seed=1))
    assert_close(w_x, x_w.permute(2, 0, 1))


def test_rows_far_from_zero():
    """By E[x²] - μ² nothing would be left of rows about 10⁴ in float32."""
    x = torch.randn(50, 300) + 1e4
    right = F.layer_norm(x.double(), [300])
    mine, stock = ((f(x, [300]).double() - right).abs().mean() for f in (ours.layer_norm, F.layer_norm))
    assert mine <= 1.05 * stock


def test_a_row_of_one_number_repeated_is_the_bias():
    x = torch.full((3, 1000), 0.1)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(ours.layer_norm(x.to(dtype), [1000], None, x[0].to(dtype)), x.to(dtype))


def test_statistics_are_kept_in_float32():
    """torch keeps them in bfloat16 on CPU beside a weight of bfloat16: its gradient is as exact as they."""
    x, w, g = (torch.randn(s).bfloat16() for s in ((64, 256), (256,), (64, 256)))
    errors = []
    gradient = lambda f, *a: torch.autograd.grad(f(a[0], [256], a[1]), a[0], a[2])[0].double()  # noqa: E731
    right = gradient(F.layer_norm, x.double().requires_grad_(), w.double(), g.double())
    for f in (ours.layer_norm, F.layer_norm):
        errors.append((gradient(f, x.clone().requires_grad_(), w, g) - right).abs().mean().item())
    assert errors[0] < errors[1]


def test_the_gradient_of_a_bias_does_not_come_to_a_stop():
    """torch 2.13 sums it in bfloat16 on CPU, where 256 + 1 is 256: of 4096 ones it makes 512 with 2 threads."""
    x, b = torch.randn(4096, 8).bfloat16(), torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    y = ours.layer_norm(x, [8], torch.ones_like(b), b)
    (g,) = torch.autograd.grad(y, b, torch.ones_like(y))
    assert g.tolist() == [4096] * 8
