"""What reduction does to halves: computed in float32 and rounded once, everywhere."""

import pytest
import torch
from torch.func import vmap

import torchcalc.functional as F

n = 70000  # the sum of so many ones is beyond float16
LOSSES = {  # name: (function of input and target, an input, a target)
    "mse_loss": (F.mse_loss, 300.0, 0.0),
    "l1_loss": (F.l1_loss, 300.0, 0.0),
    "huber_loss": (F.huber_loss, 300.0, 0.0),
    "smooth_l1_loss": (F.smooth_l1_loss, 300.0, 0.0),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, 300.0, 0.0),
    "binary_cross_entropy": (F.binary_cross_entropy, 0.01, 1.0),
    "kl_div": (F.kl_div, -9.0, 1.0),
    "poisson_nll_loss": (F.poisson_nll_loss, 10.0, 0.0),
    "gaussian_nll_loss": (lambda x, t, **options: F.gaussian_nll_loss(x, t, torch.ones_like(x), **options), 300.0, 0.0),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_of_halves(name, dtype):
    """Of one large number and zeros, where its square is beyond float16, and of very many: as float64 has them."""
    f, x, t = LOSSES[name]
    count = 4 if name == "mse_loss" else n
    x = torch.full((count,), x, dtype=dtype)
    t = torch.full((count,), t, dtype=dtype)
    if count == 4:
        x[1:] = 0
    expected = f(x.double(), t.double()).to(dtype)
    assert expected.isfinite()
    for each in (f, lambda x, t: vmap(f)(x[None], t[None])[0]):
        mean = each(x, t)
        assert mean.dtype is dtype
        assert mean == expected


def test_a_squared_error_whose_sum_is_too_large():
    assert (
        F.mse_loss(torch.tensor([300.0, 0, 0, 0]).half(), torch.zeros(4).half()).item() == 22496
    )  # 22500, as float16 has it
    x = torch.tensor([300.0, 0, 0, 0]).half()
    weight = torch.ones(4).half()
    assert F.mse_loss(x, torch.zeros(4).half(), weight=weight).item() == 22496  # 22500, as float16 has it
