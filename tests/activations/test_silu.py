import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import silu


@table("silu")
def test_silu(row, check):
    check(row)


def test_of_complex_numbers():
    """torch has the value alone; by the product rule the gradient is the conjugate of σ + x·σ·(1 - σ)."""
    x = torch.complex(torch.linspace(-1, 2, 5), torch.linspace(1, -2, 5)).requires_grad_()
    y = silu(x)
    s = x.detach().sigmoid()
    assert_close(y.detach(), x.detach() * s)
    assert_close(torch.autograd.grad(y, x, torch.ones_like(y))[0], (s + x.detach() * s * (1 - s)).conj())
