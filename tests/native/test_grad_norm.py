"""‖g‖² in one read: exact to float64, finite or not."""

import math

import pytest
import torch

from tests.native.common import DTYPES, SIZES
from torchcalc.native.optim import grad_norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_norm_sums_the_squares(dtype: torch.dtype) -> None:
    grads = [torch.randn(n, dtype=dtype) * 3 for n in [*SIZES, 8191, 8192, 8193, 70_000]]
    norm = grad_norm(grads)
    assert norm is not None and norm.finite
    everything = torch.cat([g.double() for g in grads])
    truth = math.fsum(everything.square().tolist())
    # Squares are exact but in float64; a lane adds 8192 / 32 of them, then come the lanes, then the blocks.
    additions = 8192 / 32 + 5 + len(everything) / 8192 + len(grads) + (dtype == torch.float64)
    assert abs(norm.squared - truth) <= additions * 2.0**-53 * truth
    clipped = torch.nn.utils.get_total_norm(grads)
    assert math.sqrt(norm.squared) == pytest.approx(clipped.item(), rel=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_norm_finds_every_non_finite_element(dtype: torch.dtype, bad: float) -> None:
    for n, i in [(1, 0), (20, 19), (8200, 8195), (50_000, 31_234)]:
        grads = [torch.randn(7, dtype=dtype), torch.randn(n, dtype=dtype)]
        grads[1][i] = bad
        norm = grad_norm(grads)
        assert norm is not None and not norm.finite and not math.isfinite(norm.squared)


def test_grad_norm_of_large_and_unsupported_gradients() -> None:
    assert grad_norm([]) == (0.0, True)
    assert grad_norm([torch.zeros(0), torch.zeros(3, 0)]) == (0.0, True)
    largest = torch.finfo(torch.float32).max
    norm = grad_norm([torch.full((1000,), largest)])  # torch's float32 sum of squares is infinite
    assert norm is not None and norm.finite
    assert norm.squared == pytest.approx(1000 * largest**2, rel=1e-12)
    assert grad_norm([torch.full((9,), 1e200, dtype=torch.float64)]) == (math.inf, True)
    ok = torch.randn(5)
    for refused in (torch.randn(10)[::2], ok.to_sparse(), ok.to("meta"), ok.int(), torch.randn(1).expand(5)):
        assert grad_norm([ok, refused]) is None
    permuted = torch.randn(3, 4, 5).permute(2, 0, 1)
    assert grad_norm([permuted]) is not None
