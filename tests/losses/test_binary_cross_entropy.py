import torch
from torch.testing import assert_close

from tests.functions import table
from torchcalc.functional import binary_cross_entropy_with_logits


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
