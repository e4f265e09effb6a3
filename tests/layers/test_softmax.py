import pytest
import torch
from torch.testing import assert_close

import torchcalc.functional as ours
from tests.functions import table


@table("softmax")
def test_softmax(row, check):
    check(row)


@table("log_softmax")
def test_log_softmax(row, check):
    check(row)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("float32", "float64"),
        ("bfloat16", "float32"),
        ("float64", "float32"),
        ("int64", "float32"),
        ("float32", "bfloat16"),
    ],
)
def test_dtype(name, given, dtype):
    x = torch.tensor([[1, -2, 3], [0, 5, 4]]).to(getattr(torch, given))
    results = []
    for f in (getattr(ours, name), getattr(torch.nn.functional, name)):
        leaf = x.clone().requires_grad_(x.is_floating_point())
        y = f(leaf, 1, dtype=getattr(torch, dtype))
        results.append((y.detach(), torch.autograd.grad(y[:, 0].sum(), leaf) if leaf.requires_grad else ()))
        if leaf.requires_grad:
            results[-1] += torch.func.jvp(lambda z, f=f: f(z, 1, dtype=getattr(torch, dtype)), (x,), (x.sin(),))
    assert [t.dtype for t in results[0] if isinstance(t, torch.Tensor)] == [
        t.dtype for t in results[1] if isinstance(t, torch.Tensor)
    ]
    low = torch.bfloat16 in (getattr(torch, dtype), x.dtype)  # torch rounds to it once more on the way
    assert_close(*results, rtol=1e-2 if low else None, atol=1e-3 if low else None)


def test_the_dimension_that_torch_guesses():
    for shape, dim in (((3,), 0), ((2, 3), 1), ((2, 3, 2), 0), ((), 0), ((2, 1, 2, 2), 1)):
        x = torch.rand(shape)
        with pytest.warns(UserWarning, match="Implicit dimension choice for softmax"):
            assert_close(ours.softmax(x), torch.softmax(x, dim))
