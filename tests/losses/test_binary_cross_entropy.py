from functools import partial

import pytest
import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from torchcalc.testing import assert_function


@table("binary_cross_entropy_with_logits")
def test_binary_cross_entropy_with_logits(row, check):
    check(row)


@table("binary_cross_entropy")
def test_binary_cross_entropy(row, check):
    check(row)


def test_gradients_of_the_weights():
    """torch refuses them. By the textbook: ∂L/∂w = ℓ/N, ∂L/∂p = -w·t·log σ(x)/N, summed over what was broadcast."""
    x, t = torch.tensor([[1.0, -2.0], [0.5, 3.0]]).double(), torch.tensor([[0.0, 1.0], [1.0, 0.25]]).double()
    w, p = (torch.tensor(v).double().requires_grad_() for v in ([2.0, 0.5], [3.0, 1.5]))
    by_w, by_p = torch.autograd.grad(binary_cross_entropy_with_logits(x, t, w, pos_weight=p), (w, p))
    sigma = 1 / (1 + torch.exp(-x))
    losses = -p.detach() * t * sigma.log() - (1 - t) * (1 - sigma).log()
    assert_close(by_w, losses.sum(0) / 4)
    assert_close(by_p, (-w.detach() * t * sigma.log()).sum(0) / 4)


def test_huge_logits():
    x = torch.tensor([1e4, -1e4, 1e4, -1e4, 88.0, -88.0], requires_grad=True)
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    y = binary_cross_entropy_with_logits(x, t, reduction="none")
    assert_close(y, torch.tensor([0.0, 0.0, 1e4, 1e4, 88.0, 88.0]))
    assert_close(torch.autograd.grad(y.sum(), x)[0], torch.tensor([0.0, 0.0, 1.0, -1.0, 1.0, -1.0]))


def test_the_dtype_of_the_result_is_torchs():
    for a, b in (("float32", "float64"), ("float64", "float32"), ("bfloat16", "float32")):
        x, t = torch.tensor([0.5]).to(getattr(torch, a)), torch.tensor([0.25]).to(getattr(torch, b))
        results = []
        for f in (binary_cross_entropy_with_logits, torch.nn.functional.binary_cross_entropy_with_logits):
            leaf = x.clone().requires_grad_()
            y = f(leaf, t)
            results.append((y, torch.autograd.grad(y, leaf)))
        assert [v.dtype for v in (results[0][0], *results[0][1])] == [v.dtype for v in (results[1][0], *results[1][1])]
        assert_close(*results, rtol=1e-2, atol=1e-2)


inf = torch.inf


@pytest.mark.parametrize("pos_weight", [None, torch.ones(6)])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 1, 1, 1, 0, 2])])
def test_certain_logits(weight, pos_weight):
    """Certain and right costs 0, certain and wrong everything; 0·∞ = 0."""
    x = torch.tensor([inf, -inf, inf, -inf, 3.0, 0.0])
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.5])
    y = binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight, reduction="none")
    last = 0 if weight is not None else 0.048587
    expected = torch.tensor([0.0, 0.0, inf, inf, last, 0.693147 * (1 if weight is None else 2)])
    assert_close(y, expected, rtol=1e-4, atol=1e-6)


def test_mixed_derivatives_at_a_logit_of_zero_and_a_target_of_zero():
    """∂²ℓ/∂p∂t = s(-x) and ∂²ℓ/∂p∂x = -t·σ(-x): neither where 0·∞ = 0 nor at the bend of |x| is one lost."""
    x, t, p = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.0, 0.0, 2.0))
    (by_p,) = torch.autograd.grad(binary_cross_entropy_with_logits(x, t, pos_weight=p), p, create_graph=True)
    assert_close(torch.autograd.grad(by_p, t, retain_graph=True)[0], torch.tensor(2.0).double().log())
    t = torch.tensor(0.5, dtype=torch.float64)
    (by_p,) = torch.autograd.grad(binary_cross_entropy_with_logits(x, t, pos_weight=p), p, create_graph=True)
    assert_close(torch.autograd.grad(by_p, x)[0], torch.tensor(-0.25).double())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_probabilities_at_the_bounds(reduction, dtype):
    """The logarithm's bound of 100, and the gradient's of 10¹², are torch's."""
    q = torch.tensor([0.0, 1.0, 0.0, 1.0, 1e-20, 1e-13, 0.3, 0.5], dtype=dtype)
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0, 1.0], dtype=dtype)
    results = []
    for f in (binary_cross_entropy, torch.nn.functional.binary_cross_entropy):
        leaf = q.clone().requires_grad_()
        y = f(leaf, t, reduction=reduction)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), leaf)))
    assert_close(*results)


def test_the_gradient_of_a_certain_target_is_finite():
    """torch's is inf: it leaves the bound out."""
    t = torch.tensor([1.0, 0.0], requires_grad=True)
    y = binary_cross_entropy(torch.tensor([0.0, 1.0]), t, reduction="sum")
    assert torch.autograd.grad(y, t)[0].tolist() == [100.0, -100.0]


def test_probabilities_under_autocast():
    q, t = torch.tensor([0.25, 0.75]), torch.tensor([0.0, 1.0])
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            results = [
                f(q.to(dtype), t.to(dtype)) for f in (binary_cross_entropy, torch.nn.functional.binary_cross_entropy)
            ]
        assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weighted_losses_of_halves_are_rounded_once(reduction):
    torch.manual_seed(0)
    q, t, w = (torch.rand(500).half() * 0.9 + 0.05 for _ in range(3))
    truth = binary_cross_entropy(q.double(), t.double(), w.double(), reduction=reduction)
    assert binary_cross_entropy(q, t, w, reduction=reduction) == truth.half()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_report_of_probabilities(reduction):
    """Against torch's, with its bounds at 0 and 1."""
    torch.manual_seed(0)
    q, t = torch.rand(3, 4) * 0.8 + 0.1, torch.rand(3, 4)
    mine, theirs = (
        partial(f, reduction=reduction) for f in (binary_cross_entropy, torch.nn.functional.binary_cross_entropy)
    )
    assert_function(mine, q, t, reference=theirs, wrt=(0,), name="binary_cross_entropy", progress=False)
