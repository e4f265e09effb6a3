import pytest
import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import glu


@table("glu")
def test_glu(row, check):
    check(row)


@table("swiglu")
def test_swiglu(row, check):
    check(row)


@table("geglu")
def test_geglu(row, check):
    check(row)


@table("reglu")
def test_reglu(row, check):
    check(row)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_as_torchs(dim, dtype):
    """The table has its definition as the twin."""
    results = []
    for f in (glu, torch.nn.functional.glu):
        x = torch.linspace(-3, 3, 24).reshape(4, 6).to(dtype).requires_grad_()
        y = f(x, dim)
        results.append((y.detach(), *torch.autograd.grad(y, x, y.detach().cos())))
    assert_close(*results)


def layouts(dtype):
    x = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 2),
        "strided": x[:, ::5],
        "expanded": x[:1].expand(6, 10, 4),
        "empty": x[:0],
        "long": x.flatten().repeat(401),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_halves_of_any_layout(layout, dtype):
    """One gradient, whose halves are those of the gates, against torch's in float64."""
    x = layouts(dtype)[layout]
    for dim in range(x.dim()):
        results = []
        for f, leaf in ((glu, x.clone(memory_format=torch.preserve_format)), (torch.nn.functional.glu, x.double())):
            leaf.requires_grad_()
            y = f(leaf, dim)
            g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(dtype).reshape(y.shape)
            results.append((y.detach().double(), torch.autograd.grad(y, leaf, g.to(y.dtype))[0].double()))
        tolerance = 4 * torch.finfo(dtype).eps
        assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dim", [0, -1])
def test_derivatives_of_the_gradient(dim):
    x = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: glu(x, dim), x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: glu(x, dim), x, check_batched_grad=True)
    y = glu(x, dim).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
