import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchcalc.functional as ours
import torchcalc.nn
from tests.functions import table


@table("embedding")
def test_embedding(row, check):
    check(row)


INDEX = torch.tensor([[0, 1, 1], [3, 2, 1]])
OPTIONS = {
    "padding": {"padding_idx": 1},
    "padding from the end": {"padding_idx": -2},
    "frequency": {"scale_grad_by_freq": True},
    "padding and frequency": {"padding_idx": 1, "scale_grad_by_freq": True},
    "sparse": {"sparse": True},
    "sparse with padding": {"sparse": True, "padding_idx": 3},
    "max_norm": {"max_norm": 0.5},
    "max_norm 1": {"max_norm": 0.5, "norm_type": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_options_as_torchs(case, dtype):
    results = []
    for f in (ours.embedding, F.embedding):
        w = torch.linspace(-1, 2, 15).reshape(5, 3).to(dtype).requires_grad_()
        y = f(INDEX, w, **OPTIONS[case])
        (g,) = torch.autograd.grad(y, w, torch.linspace(-1, 3, 18).reshape(2, 3, 3).to(dtype))
        results.append((w.detach(), y.detach(), g.to_dense(), torch.tensor(g.is_sparse)))
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padding", [-1, 1])
@pytest.mark.parametrize("frequency", [False, True])
def test_the_gradient_is_linear_in_what_comes_in(padding, frequency):
    """Its derivative leads back: the second one is right also where torch refuses it."""
    w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def gradient(g):
        y = ours.embedding(INDEX, w, None if padding < 0 else padding, scale_grad_by_freq=frequency, scale=2.0)
        return torch.autograd.grad(y, w, g, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, g)


def test_scale_of_a_sparse_gradient_and_of_a_module():
    module = torchcalc.nn.Embedding(5, 3, sparse=True, scale=3.0)
    assert repr(module) == "Embedding(5, 3, sparse=True, scale=3.0)"
    module(INDEX).sum().backward()
    assert module.weight.grad.is_sparse
    assert_close(module.weight.grad.to_dense()[:, 0], torch.tensor([3.0, 9.0, 3.0, 3.0, 0.0]))
    twin = torchcalc.nn.Embedding.from_pretrained(module.weight.detach())
    assert_close(3 * twin(INDEX), module(INDEX))


def test_of_no_index():
    w = torch.randn(5, 3, requires_grad=True)
    for scale in (1.0, 2.0):
        y = ours.embedding(torch.zeros(0, 2, dtype=torch.int64), w, scale=scale)
        assert y.shape == (0, 2, 3)
        (g,) = torch.autograd.grad(y.sum(), w, create_graph=True)
        assert_close(g, torch.zeros_like(w))


@pytest.mark.parametrize("rows", [2, 100])
def test_the_smaller_tensor_is_scaled(rows):
    w = torch.randn(rows, 3, requires_grad=True)
    index = torch.tensor([0, 1, 1, 0])
    y = ours.embedding(index, w, scale=0.5)
    assert_close(torch.autograd.grad(y.sum(), w)[0][:2], torch.ones(2, 3))
