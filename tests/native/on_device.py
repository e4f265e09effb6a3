"""Row kernels, against torch in float64: on a GPU (`make test-cuda`), or in Triton's interpreter, where
test_row_kernels.py runs them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.interpreter import mend
from torchcalc.layers.attention import scaled_dot_product_attention
from torchcalc.losses.cross_entropy import _launched
from torchcalc.losses.linear_cross_entropy import linear_cross_entropy
from torchcalc.native import gpu, row_kernels

if gpu.INTERPRETED:
    mend()
DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def launched(
    x: Tensor, t: Tensor, weight: Tensor | None = None, reduction: str = "mean", smoothing: float = 0.0
) -> Tensor:
    loss = _launched(x, t, weight, -100, reduction, smoothing)
    assert loss is not None and type(loss.grad_fn).__name__ == "LaunchedCrossEntropyFunctionBackward"
    return loss


def value_and_gradient(f, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    loss = f(leaf)
    incoming = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
    (gradient,) = torch.autograd.grad(loss, leaf, incoming.to(loss.dtype))
    return loss.detach(), gradient


#: (rows, classes): less than a block, more than one, even rows and others; the last are rows of a wider table.
SHAPES = [(1, 1), (5, 10), (3, 64), (4, 4097), (2, 8192), (6, 32)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_torch_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, classes = shape
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    if shape == SHAPES[-1]:
        x = torch.cat([x, x], 1)[:, :classes]
    t = torch.randint(classes, (rows,))
    t[1::3] = -100
    eps = torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 8)
    for reduction, smoothing, weighted in itertools.product(("none", "mean", "sum"), (0.0, 0.2), (False, True)):
        w = torch.linspace(0.1, 1, classes).to(dtype) if weighted else None
        mine = value_and_gradient(lambda x, r=reduction, s=smoothing, w=w: launched(x, t, w, r, s), x)
        options = dict(reduction=reduction, label_smoothing=smoothing, weight=None if w is None else w.double())
        right = value_and_gradient(lambda x, o=options: F.cross_entropy(x, t, **o), x.double())
        for a, b in zip(mine, right, strict=True):
            assert a.dtype == dtype
            assert torch.allclose(a.double(), b, rtol=eps, atol=eps), options


def test_rows_of_a_padded_table() -> None:
    """As linear_cross_entropy has them: even rows of no even length, whose gradient takes their place."""
    for classes in (70, 64, 4100):
        table = torch.randn(5, classes // 16 * 16 + 32)
        x, t = table[:, :classes], torch.randint(classes, (5,))
        x_, right = x.clone().requires_grad_(), table.clone()
        loss, kept = row_kernels.cross_entropy(x, t, None, -100, "sum", 0.1)
        expected = F.cross_entropy(x_, t, reduction="sum", label_smoothing=0.1)
        right[:, :classes] = torch.autograd.grad(expected, x_)[0]
        row_kernels.cross_entropy_gradient(torch.ones(()), x, t, None, kept, -100, "sum", 0.1, out=x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(table, right)


@pytest.mark.parametrize("reduction", ["wide", "mean"])
def test_z_loss(reduction: str) -> None:
    x, t = torch.randn(5, 70, dtype=torch.bfloat16), torch.randint(70, (5,))
    t[1] = -100
    wide = x.double().requires_grad_()
    losses = F.cross_entropy(wide, t, reduction="none") + 0.1 * torch.logsumexp(wide, 1).square() * (t != -100)
    right = losses if reduction == "wide" else losses.sum() / 4
    loss, kept = row_kernels.cross_entropy(x, t, None, -100, reduction, 0.0, 0.1)
    assert loss.dtype == (torch.float32 if reduction == "wide" else torch.bfloat16)
    torch.testing.assert_close(loss.double(), right.detach(), rtol=1e-5 if reduction == "wide" else 8e-3, atol=1e-5)
    g = torch.ones_like(loss)
    mine = row_kernels.cross_entropy_gradient(g, x, t, None, kept, -100, reduction, 0.0, 0.1)
    (gradient,) = torch.autograd.grad(right.sum(), wide)
    torch.testing.assert_close(mine.double(), gradient, rtol=8e-3, atol=1e-4)


def test_more_rows_than_are_summed_at_once() -> None:
    x, t = torch.randn(row_kernels.TOGETHER + 5, 2), torch.arange(row_kernels.TOGETHER + 5) % 2
    assert torch.allclose(launched(x.requires_grad_(), t), F.cross_entropy(x, t))


def test_all_ignored_is_zero() -> None:
    loss, gradient = value_and_gradient(lambda x: launched(x, torch.full((4,), -100)), torch.randn(4, 3))
    assert loss == 0 and not gradient.any()


def test_an_ignored_row_contributes_nothing_whatever_it_is() -> None:
    t = torch.tensor([-100, 1])
    for bad in (torch.inf, -torch.inf, torch.nan):
        x = torch.tensor([[bad, 1.0, 2.0], [0.0, 1.0, 2.0]])
        for smoothing in (0.0, 0.1):
            loss, gradient = value_and_gradient(lambda x, s=smoothing: launched(x, t, smoothing=s), x)
            assert torch.allclose(loss, F.cross_entropy(x[1:], t[1:], label_smoothing=smoothing))
            assert not gradient[0].any() and gradient.isfinite().all()


def test_infinities_and_what_is_far_from_zero() -> None:
    inf = torch.inf
    one = lambda row, y, **o: value_and_gradient(lambda x: launched(x, torch.tensor([y]), **o), torch.tensor([row]))  # noqa: E731
    assert torch.allclose(one([-inf, 0.0, 1.0], 2)[0], torch.tensor(math.log(1 + math.exp(-1))))
    assert one([-inf, 0.0, 1.0], 0)[0] == inf
    assert one([-inf, 0.0, 1.0], 2, smoothing=0.1)[0] == inf
    assert one([-inf, 0.0, 1.0], 2, smoothing=0.1, weight=torch.tensor([0.0, 1.0, 1.0]))[0].isfinite()
    assert one([-inf, -inf, -inf], 2)[0].isnan()
    assert one([0.0, torch.nan, 1.0], 2)[0].isnan()
    for offset in (-300.0, 1e4):
        row = [offset, offset + 1, offset + 3]
        (mine, g), (shifted, h) = one(row, 0), one([0.0, 1.0, 3.0], 0)
        assert torch.allclose(mine, shifted) and torch.allclose(g, h)


def test_a_target_that_is_no_class_makes_the_loss_nan() -> None:
    for bad in (3, -1):
        assert launched(torch.randn(2, 3).requires_grad_(), torch.tensor([0, bad])).isnan()


def test_gradients_have_derivatives() -> None:
    x, t = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 4, -100, 2])
    results = []
    for f in (launched, F.cross_entropy):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(leaf, t), leaf, create_graph=True)
        results.append(torch.autograd.grad((g * x.sin()).sum(), leaf))
    torch.testing.assert_close(*results)


def test_batches_of_gradients() -> None:
    x, t = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 4, -100, 2])
    incoming = torch.eye(4)
    results = [
        torch.autograd.grad(f(x, t, reduction="none"), x, incoming, is_grads_batched=True)
        for f in (launched, F.cross_entropy)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 32, 70, 4100])
def test_slopes_of_a_chunk_of_classes(classes: int, dtype: torch.dtype) -> None:
    """As linear_cross_entropy has them that computes its logits again: some targets lie in other chunks."""
    table = torch.randn(5, classes // 16 * 16 + 32, dtype=torch.float64).to(dtype)
    x = table[:, :classes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lse = x.double().logsumexp(1).to(wide) + 0.5
    factor, own = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]).to(wide), torch.tensor([1.0, 0.5, 0.0, 1.5, 1.0]).to(wide)
    place = torch.tensor([0, classes - 1, 0, -3, classes])
    right = factor[:, None].double() * (x.double() - lse[:, None].double()).exp()
    right[0, 0] -= 1
    right[1, classes - 1] -= 0.5
    beyond = table[:, classes:].clone()
    x[2, 0] = torch.inf  # an ignored row contributes nothing, whatever it is
    right[2] = 0
    assert row_kernels.slopes_(x, lse, factor, own, place) is x
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.double(), right, rtol=8 * eps, atol=8 * eps)
    assert torch.equal(table[:, classes:], beyond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_by_classes(dtype: torch.dtype, smoothing: float) -> None:
    x, w = (torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in ((5, 8), (150, 8)))
    t = torch.tensor([0, 149, -100, 70, 64])
    loss = linear_cross_entropy(x, w, t, memory=5 * 64 * x.element_size(), recompute=True, label_smoothing=smoothing)
    wide = [a.detach().double().requires_grad_() for a in (x, w)]
    right = F.cross_entropy(F.linear(*wide), t, label_smoothing=smoothing)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), right, rtol=8 * eps, atol=8 * eps)
    mine, theirs = torch.autograd.grad(loss, (x, w)), torch.autograd.grad(right, wide)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=8 * eps, atol=8 * eps * float(b.abs().max()))


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"mask": torch.bool},
    "added mask": {"mask": torch.float32},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_by_torchs_kernels(case: str, dtype: torch.dtype) -> None:
    """Value, first and second derivative, against the definition in float64."""
    how = dict(ATTENTION[case])
    mask, of = None, how.pop("mask", None)
    if of is not None:
        mask = torch.rand(33, 33) > 0.3
        mask[:, 0] = True
        mask = mask if of == torch.bool else torch.randn(33, 33).to(dtype)
    heads = 2 if case == "grouped" else 4
    leaves = [torch.randn(2, n, 33, 16).to(dtype).requires_grad_() for n in (4, heads, heads)]
    g, u = torch.randn(2, 4, 33, 16), torch.randn(2, 4, 33, 16)
    results = []
    for wide in (False, True):
        xs = [x.detach().double().requires_grad_() for x in leaves] if wide else leaves
        m = mask.double() if wide and mask is not None and mask.is_floating_point() else mask
        y = scaled_dot_product_attention(*xs, m, **how)
        if not wide and case != "grouped":  # of which some of torch's kernels are not capable
            assert type(y.grad_fn).__name__ == "CppFunction"
        first = torch.autograd.grad(y, xs, g.to(y.dtype), retain_graph=True)
        (grad,) = torch.autograd.grad(y, xs[:1], g.to(y.dtype), create_graph=True)
        second = torch.autograd.grad((grad * u.to(y.dtype)).sum(), xs)
        results.append([x.detach().double() for x in (y, *first, *second)])
    eps = torch.finfo(dtype).eps
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=32 * eps, atol=32 * eps * float(b.abs().max()))


@pytest.mark.parametrize(
    ("shape", "dtype", "channels_last"),
    [
        *(((2, 5, 3), dtype, False) for dtype in DTYPES),
        ((1, 3, 23, 25), torch.float32, False),
        ((1, 21, 2, 5, 2), torch.bfloat16, False),
        ((2, 5, 3, 2), torch.float32, True),
    ],
    ids=str,
)
def test_images(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> None:
    """Classes that are not side by side, of fewer and more samples than a program has at hand; and those that are."""
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    t = torch.randint(shape[1], shape[:1] + shape[2:])
    t.view(-1)[1::3] = -100
    eps = torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 8)
    for reduction, smoothing, weighted in (
        ("none", 0.0, False),
        ("mean", 0.0, True),
        ("mean", 0.2, False),
        ("none", 0.2, True),
    ):
        w = torch.linspace(0.1, 1, shape[1]).to(dtype) if weighted else None

        def mine(x: Tensor, r: str = reduction, s: float = smoothing, w: Tensor | None = w) -> Tensor:
            loss = _launched(x, t, w, -100, r, s, 0.01)
            assert loss is not None
            return loss

        def right(x: Tensor, r: str = reduction, s: float = smoothing, w: Tensor | None = w) -> Tensor:
            w = None if w is None else w.double()
            losses = F.cross_entropy(x, t, w, reduction="none", label_smoothing=s)
            losses = losses + 0.01 * torch.logsumexp(x, 1).square() * (t != -100)
            share = (t != -100).double() if w is None else torch.where(t == -100, 0, w[t.clamp(min=0)])
            return losses if r == "none" else losses.sum() / share.sum()

        for a, b in zip(value_and_gradient(mine, x), value_and_gradient(right, x.double()), strict=True):
            assert a.dtype == dtype and a.shape == b.shape
            assert torch.allclose(a.double(), b, rtol=eps, atol=eps)
