"""What is written over its input: the same numbers as a new tensor has, for every size, dtype and layout."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torchcalc.functional as ours

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    name: getattr(ours, name) for name in ("relu", "silu", "elu", "mish", "leaky_relu")
}
SIZES = [
    0,
    1,
    2,
    3,
    31,
    512,
    513,
    1025,
    4096,
    4097,
    40_000,
    40_001,
    40_002,
]  # loops compute two at a time, threads parts
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
activations = pytest.mark.parametrize("f", ACTIVATIONS.values(), ids=ACTIVATIONS)


@activations
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_numbers_of_a_new_tensor(f, dtype, device):
    for n in SIZES:
        x = torch.randn(n).to(device, dtype)
        results = []
        for inplace in (False, True):
            leaf = x.clone().requires_grad_()
            y = f(leaf * 1, inplace=inplace)
            (g,) = torch.autograd.grad(y.cos().sum(), leaf)
            given = x.clone()
            with torch.no_grad():
                z = f(given, inplace=inplace)
            assert (z is given) is inplace
            results.append((y.detach(), g, z))
        assert all(map(torch.equal, *results)), n


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a view": lambda x: x[1:3],
    "a column": lambda x: x[:, 1],
    "transposed": lambda x: x.T,
    "every second": lambda x: x[::2],
}


@activations
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_view_changes_its_base(f, layout):
    """And the gradient of the base goes through the function where it was changed, and past it elsewhere."""
    x = torch.randn(4, 5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    base = leaf * 1
    y = f(layout(base), inplace=True)
    (found,) = torch.autograd.grad(base.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(found.square().sum(), leaf)

    other = x.clone().requires_grad_()
    where = layout(torch.arange(x.numel()).view(x.shape))
    expected = (other * 1).flatten().index_put((where,), f(layout(other)))
    assert torch.equal(base.flatten(), expected) and torch.equal(y, layout(base))
    (g,) = torch.autograd.grad(expected.square().sum(), other, create_graph=True)
    torch.testing.assert_close(found, g)
    torch.testing.assert_close(second, torch.autograd.grad(g.square().sum(), other)[0])


@activations
def test_what_is_refused(f):
    leaf = torch.randn(3, requires_grad=True)
    for given, why in ((leaf, "a leaf Variable"), (leaf[1:], "a view of a leaf")):
        before = leaf.detach().clone()
        with pytest.raises(RuntimeError, match=f"{why} .*in-place operation"):
            f(given, inplace=True)
        assert torch.equal(leaf, before)
    with torch.no_grad():
        f(leaf, inplace=True)
    assert leaf._version == 1
    with torch.inference_mode():
        x = torch.tensor([-1.0, 2.0])
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        f(x, inplace=True)
    assert x.tolist() == [-1.0, 2.0]


@activations
def test_backward_after_another_change_is_right_or_refused(f):
    """The result is kept by some, and must not change; the input's copy by the others, and nothing can change it."""
    leaf = torch.tensor([-1.0, 2.0], requires_grad=True)
    expected = torch.autograd.grad(f(leaf).sum(), leaf)[0]
    y = f(leaf * 1, inplace=True)
    y.add_(1)
    if f in (ours.relu, ours.leaky_relu):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), leaf)
    else:
        assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], expected)
