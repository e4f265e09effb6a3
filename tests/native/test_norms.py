"""The kernel of rms_norm, add_rms_norm and layer_norm: every layout, dtype and option against torch in float64, beside the
operations that stand in for it."""

import itertools

import pytest
import torch
from torch import Tensor

from torchcalc.functional import add_rms_norm, layer_norm, rms_norm
from torchcalc.layers.add_rms_norm import AddRMSNormFunction
from torchcalc.layers.layer_norm import LayerNormFunction
from torchcalc.layers.rms_norm import RMSNormFunction
from torchcalc.native import pointwise

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-5

#: How rows may lie, by name: (shape, dimensions of a row, made from a contiguous tensor of it). More than 1,024 numbers are
#: several pieces, more than 32,768 in all several blocks of rows.
LAYOUTS = {
    "one row": ((7,), 1, lambda x: x),
    "one number": ((3, 1), 1, lambda x: x),
    "rows": ((5, 40), 1, lambda x: x),
    "long rows": ((3, 2500), 1, lambda x: x),
    "many rows": ((700, 96), 1, lambda x: x),
    "rows of two dimensions": ((2, 3, 4, 5), 2, lambda x: x),
    "rows of a wider table": ((5, 40), 1, lambda x: torch.cat([x, x], 1)[:, :40]),
    "one row, repeated": ((5, 40), 1, lambda x: x[:1].expand(5, 40)),
    "transposed": ((5, 40), 1, lambda x: x.t().contiguous().t()),
    "turned leading dimensions": ((4, 3, 40), 1, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "every other number": ((5, 40), 1, lambda x: torch.stack([x, x], -1)[..., 0]),
}


def by_kernel(kind: str, x: Tensor, a: Tensor, w: Tensor | None, b: Tensor | None, dims: int) -> tuple[Tensor, ...]:
    shape = x.shape[x.dim() - dims :]
    if kind == "add_rms_norm":
        return add_rms_norm(x, a, shape, w, EPS)
    return (rms_norm(x, shape, w, EPS) if kind == "rms_norm" else layer_norm(x, shape, w, b, EPS),)


def by_operations(kind: str, x: Tensor, a: Tensor, w: Tensor | None, b: Tensor | None, dims: int) -> tuple[Tensor, ...]:
    if kind == "add_rms_norm":
        return AddRMSNormFunction.apply(x, a, w, dims, EPS)[:2]
    if kind == "rms_norm":
        return RMSNormFunction.apply(x, w, dims, EPS)[:1]
    return LayerNormFunction.apply(x, w, b, dims, EPS)[:1]


def by_torch(kind: str, x: Tensor, a: Tensor, w: Tensor | None, b: Tensor | None, dims: int) -> tuple[Tensor, ...]:
    shape = x.shape[x.dim() - dims :]
    if kind == "layer_norm":
        return (torch.nn.functional.layer_norm(x, shape, w, b, EPS),)
    s = x + a if kind == "add_rms_norm" else x
    y = torch.nn.functional.rms_norm(s, shape, w, EPS)
    return (y, s) if kind == "add_rms_norm" else (y,)


def results(f, kind: str, inputs: list[Tensor | None], dims: int, incoming: list[Tensor]) -> list[Tensor]:
    """The values, and the gradient of every input that takes part."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    values = f(kind, *leaves, dims)
    used = [t for i, t in enumerate(leaves) if t is not None and (i != 1 or kind == "add_rms_norm")]
    return [*(v.detach() for v in values), *torch.autograd.grad(values, used, incoming[: len(values)])]


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm", "layer_norm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_torch_in_float64(layout, kind, dtype):
    assert pointwise.rows() is not None
    shape, dims, lay = LAYOUTS[layout]
    size = shape[len(shape) - dims :]
    tolerance = torch.finfo(dtype).eps * (512 if dtype == torch.float64 else 8)  # of which torch has its part
    wide = torch.float64
    for weighted, biased in itertools.product((False, True), (False, True) if kind == "layer_norm" else (False,)):
        x, a = (lay(numbers(*shape, seed=k, dtype=dtype)) for k in (0, 1))
        w = numbers(*size, seed=2, dtype=dtype) if weighted else None
        b = numbers(*size, seed=3, dtype=dtype) if biased else None
        incoming = [lay(numbers(*shape, seed=k, dtype=dtype)) for k in (4, 5)]
        inputs = [x, a, w, b]
        if kind == "add_rms_norm":  # whose sum is rounded: of numbers that need it not, the same is right
            inputs[:2] = x, a = [lay((t * 4).round().div(4)) for t in (x, a)]
        mine = results(by_kernel, kind, inputs, dims, incoming)
        right = results(
            by_torch, kind, [None if t is None else t.to(wide) for t in inputs], dims, [g.to(wide) for g in incoming]
        )
        for found, true in zip(mine, right, strict=True):
            assert found.dtype == dtype
            scale = max(true.abs().max().item(), 1)
            assert (found.double() - true).abs().max().item() <= tolerance * scale, (weighted, biased)
        assert mine[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm", "layer_norm"])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_errors_are_at_most_those_of_operations(kind, dtype, offset):
    shape = (600, 384)
    x, a = (numbers(*shape, seed=k, dtype=dtype) + offset for k in (0, 1))
    inputs = [x, a, *(numbers(384, seed=k, dtype=dtype) for k in (2, 3))]
    if kind != "layer_norm":
        inputs[3] = None
    incoming = [numbers(*shape, seed=k, dtype=dtype) for k in (4, 5)]
    s = x + a
    wide = [None if t is None else t.double() for t in inputs]
    if kind == "add_rms_norm":
        wide[0], wide[1] = s.double(), torch.zeros_like(wide[0])
    right = results(by_torch, kind, wide, 1, [g.double() for g in incoming])
    errors = []
    for f in (by_kernel, by_operations, by_torch):
        found = results(f, kind, inputs, 1, incoming)
        errors.append([(t.double() - true).abs().mean().item() for t, true in zip(found, right, strict=True)])
    for mine, operations, stock in zip(*errors, strict=True):
        assert mine <= 1.05 * min(operations, stock) + 1e-9, errors


@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm", "layer_norm"])
@pytest.mark.parametrize("shape", [(513, 700), (40, 5000), (3000, 30)], ids=str)
def test_every_number_of_threads_gives_the_same(kind, shape):
    inputs = [torch.randn(shape), torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])]
    inputs[3] = inputs[3] if kind == "layer_norm" else None
    incoming = [torch.randn(shape), torch.randn(shape)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(by_kernel, kind, inputs, 1, incoming))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm", "layer_norm"])
def test_it_is_the_kernel_that_answers(kind):
    for (shape, dims, lay), dtype in itertools.product(LAYOUTS.values(), DTYPES):
        x = lay(torch.zeros(shape, dtype=dtype)).requires_grad_()
        for y in by_kernel(kind, x, x, None, None, dims):
            assert type(y.grad_fn).__name__ == "CppFunction", y.grad_fn


def test_only_what_is_needed_is_computed():
    x, w, b = torch.randn(5, 8), torch.randn(8), torch.randn(8)
    for needed in itertools.product((False, True), repeat=3):
        if not any(needed):
            continue
        leaves = [t.clone().requires_grad_(n) for t, n in zip((x, w, b), needed, strict=True)]
        given = [t for t, n in zip(leaves, needed, strict=True) if n]
        grads = torch.autograd.grad(layer_norm(leaves[0], [8], *leaves[1:]).sin().sum(), given)
        right = torch.autograd.grad(torch.nn.functional.layer_norm(leaves[0], [8], *leaves[1:]).sin().sum(), given)
        torch.testing.assert_close(grads, right)


def test_a_gradient_that_is_one_number():
    x = torch.randn(5, 8, requires_grad=True)
    for mine, stock in ((rms_norm, torch.nn.functional.rms_norm), (layer_norm, torch.nn.functional.layer_norm)):
        torch.testing.assert_close(
            torch.autograd.grad(mine(x, [8]).sum(), x),
            torch.autograd.grad(stock(x, [8]).sum(), x),
            rtol=1e-4,
            atol=1e-6,
        )


def test_a_changed_input_is_noticed_in_backward():
    x = torch.randn(4, 3, requires_grad=True)
    rows = x * 1
    y = rms_norm(rows, [3])
    rows.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_and_freed():
    x, w = torch.randn(4, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    y = layer_norm(x, [3], w).sin().sum()
    first = torch.autograd.grad(y, (x, w), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(y, (x, w))))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x)


def test_batches_of_gradients():
    x, w = torch.randn(4, 5, requires_grad=True), torch.rand(5, requires_grad=True)
    incoming = torch.randn(3, 4, 5)
    for mine, stock in ((rms_norm, torch.nn.functional.rms_norm), (layer_norm, torch.nn.functional.layer_norm)):
        found = [torch.autograd.grad(f(x, [5], w), (x, w), incoming, is_grads_batched=True) for f in (mine, stock)]
        torch.testing.assert_close(*found)
