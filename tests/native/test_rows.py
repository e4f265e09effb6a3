"""cross_entropy's kernel: every layout, dtype and option against torch in float64, and what it must not lose."""

import itertools

import pytest
import torch
from torch import Tensor

from torchcalc import functional
from torchcalc.functional import cross_entropy
from torchcalc.native import pointwise

F = torch.nn.functional
HALVES = (torch.bfloat16, torch.float16)

#: How logits may lie, by name: (shape, made from a contiguous tensor of it). More than 1,024 classes take several chunks,
#: more than 128 samples side by side several blocks.
LAYOUTS = {
    "one sample": ((7,), lambda x: x),
    "one class": ((4, 1), lambda x: x),
    "rows": ((5, 10), lambda x: x),
    "long rows": ((3, 2500), lambda x: x),
    "rows of a wider table": ((5, 10), lambda x: torch.cat([x, x], 1)[:, :10]),
    "transposed": ((300, 33), lambda x: x.t().contiguous().t()),
    "many classes, transposed": ((4, 1100), lambda x: x.t().contiguous().t()),
    "sequences": ((4, 3, 5), lambda x: x),
    "images": ((2, 5, 9, 17), lambda x: x),
    "images, channels last": ((2, 5, 9, 17), lambda x: x.to(memory_format=torch.channels_last)),
    "images, turned": ((2, 5, 9, 17), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "reversed batch": ((4, 6, 3), lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
}
#: Of which a contiguous copy is made.
COPIED = ("rows of a wider table", "images, turned", "reversed batch")
OPTIONS = [
    dict(reduction=reduction, label_smoothing=smoothing, weighted=weighted, kind=kind)
    for reduction, smoothing, weighted, kind in itertools.product(
        ("none", "mean", "sum"), (0.0, 0.2), (False, True), ("classes", "some ignored", "probabilities")
    )
]


def targets(kind: str, x: Tensor) -> Tensor:
    axis = 0 if x.dim() == 1 else 1
    generator = torch.Generator().manual_seed(1)
    if kind == "probabilities":
        return torch.softmax(torch.randn(x.shape, generator=generator), axis).to(x.dtype)
    t = torch.randint(x.shape[axis], x.narrow(axis, 0, 1).squeeze(axis).shape, generator=generator)
    if kind == "some ignored" and t.numel() > 1:
        t.view(-1)[::3] = -100
    return t


def value_and_gradient(f, x: Tensor, t: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    loss = f(leaf, t, **options)
    incoming = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
    (gradient,) = torch.autograd.grad(loss, leaf, incoming.to(loss.dtype))
    return loss.detach(), gradient


def double(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_torch_in_float64(layout, dtype):
    shape, lay = LAYOUTS[layout]
    x = lay((torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype))
    eps = torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 8)
    for option in OPTIONS:
        weighted, kind = option["weighted"], option["kind"]
        t = targets(kind, x)
        w = torch.linspace(0.1, 1, x.shape[min(1, x.dim() - 1)]).to(dtype) if weighted else None
        arguments = dict(reduction=option["reduction"], label_smoothing=option["label_smoothing"])
        loss, gradient = value_and_gradient(cross_entropy, x, t, weight=w, **arguments)
        wide = value_and_gradient(F.cross_entropy, x.double(), double(t), weight=double(w), **arguments)
        assert torch.allclose(loss.double(), wide[0], rtol=eps, atol=eps), option
        assert torch.allclose(gradient.double(), wide[1], rtol=eps, atol=eps), option
        assert gradient.dtype == loss.dtype == dtype
        if layout not in COPIED:
            assert gradient.stride() == x.stride()


@pytest.fixture
def from_the_kernel():
    """The function must be the kernel's, not the operations that stand in for it."""
    assert pointwise.rows() is not None

    def check(loss: Tensor) -> Tensor:
        assert type(loss.grad_fn).__name__ == "CppFunction", loss.grad_fn
        return loss

    return check


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_it_is_the_kernel_that_answers(layout, dtype, from_the_kernel):
    shape, lay = LAYOUTS[layout]
    x = lay(torch.zeros(shape, dtype=dtype)).requires_grad_()
    for kind in ("classes", "probabilities"):
        from_the_kernel(cross_entropy(x, targets(kind, x), label_smoothing=0.1))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("classes", [10, 1000, 20_000])
def test_errors_are_at_most_torchs(classes, offset):
    x = torch.randn(100, classes, generator=torch.Generator().manual_seed(0)) * 4 + offset
    t = torch.arange(100) % classes
    for options in ({}, {"label_smoothing": 0.1}):
        right = value_and_gradient(F.cross_entropy, x.double(), t, reduction="none", **options)
        errors = []
        for f in (cross_entropy, F.cross_entropy):
            found = value_and_gradient(f, x, t, reduction="none", **options)
            errors.append([(a - b).abs().mean().item() for a, b in zip(found, right, strict=True)])
        for mine, stock in zip(*errors, strict=True):
            assert mine <= 1.1 * stock + 1e-9, (options, errors)


def test_every_number_of_threads_gives_the_same():
    x, t = torch.randn(513, 700), torch.randint(700, (513,))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(cross_entropy, x, t))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_target_that_is_no_class_is_refused_before_anything_is_returned():
    x = torch.randn(300, 40)
    for bad in (40, -1, 2**40):
        t = torch.zeros(300, dtype=torch.int64)
        t[299] = bad
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            cross_entropy(x, t)


def test_a_changed_input_is_noticed_in_backward():
    x = torch.randn(4, 3, requires_grad=True)
    logits = x * 1
    loss = cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice_and_freed():
    x, t = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    loss = cross_entropy(x, t)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("log", [False, True])
def test_softmax_is_torchs_and_can_be_differentiated_again(log):
    ours, stock = (functional.log_softmax, F.log_softmax) if log else (functional.softmax, F.softmax)
    for shape, dim in (((5,), 0), ((), 0), ((3, 4), -1), ((3, 4, 2), 1)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(shape, dtype=torch.float64)
        results = []
        for f in (ours, stock):
            y = f(x, dim)
            (g,) = torch.autograd.grad(y, x, weights, create_graph=True)
            results.append((y, g, *torch.autograd.grad((g * weights.sin()).sum(), x)))
        assert type(ours(x, dim).grad_fn).__name__ == "CppFunction"
        torch.testing.assert_close(*results)
