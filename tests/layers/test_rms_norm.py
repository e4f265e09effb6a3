import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchcalc.functional as ours
from tests.functions import table


@table("rms_norm")
def test_rms_norm(row, check):
    check(row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_eps_that_is_not_given(dtype):
    """Rows so small that it decides."""
    x = (torch.linspace(1, 2, 8) * 1e-4).to(dtype)
    for given in (x, x.clone().requires_grad_()):
        assert_close(ours.rms_norm(given, [8]), F.rms_norm(given, [8]))


def test_squares_that_float16_cannot_hold():
    x = torch.tensor([300.0, -400.0, 0.0, 0.0], dtype=torch.float16)
    assert ours.rms_norm(x, [4]).tolist() == pytest.approx([1.2, -1.6, 0, 0], rel=1e-3)


def test_the_product_with_the_weight_is_rounded_once():
    """Models that round the normed row first, then the product, are off by a half more in the mean."""
    x, w = torch.randn(500, 64).bfloat16(), torch.rand(64).add(0.5).bfloat16()
    right = F.rms_norm(x.double(), [64], w.double(), 1e-6)
    twice = F.rms_norm(x, [64], None, 1e-6) * w
    error, of_two = ((y.double() - right).abs().mean() for y in (ours.rms_norm(x, [64], w, 1e-6), twice))
    assert error < 0.8 * of_two


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_weights_in_float32_beside_16_bits(name):
    for dtype in (torch.bfloat16, torch.float16):
        x, g = torch.randn(5, 8).to(dtype), torch.randn(5, 8).to(dtype)
        w = torch.rand(8) + 0.5
        results = []
        for f, wide in ((getattr(ours, name), False), (getattr(F, name), True)):
            leaves = [(a.double() if wide else a.clone()).requires_grad_() for a in (x, w)]
            y = f(leaves[0], [8], leaves[1], eps=1e-5)
            results.append((y, *torch.autograd.grad(y, leaves, g.to(y.dtype))))
        assert [a.dtype for a in results[0]] == [dtype, dtype, torch.float32]
        for mine, right in zip(*results, strict=True):
            assert_close(
                mine.double(), right, rtol=torch.finfo(mine.dtype).eps * 4, atol=torch.finfo(mine.dtype).eps * 4
            )


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_nested_tensors_are_torchs(name):
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    for mine, theirs in zip(getattr(ours, name)(x, [4]).unbind(), getattr(F, name)(x, [4]).unbind(), strict=True):
        assert_close(mine, theirs)
