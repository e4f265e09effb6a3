import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import torchcalc.functional as ours
from tests.functions import table
from torchcalc.layers import attention


@table("scaled_dot_product_attention")
def test_scaled_dot_product_attention(row, check):
    check(row)


def arguments(*lead, length=3, keys=5, features=4, dtype=torch.float64):
    shapes = (*lead, length, features), (*lead, keys, features), (*lead, keys, features)
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal, more keys than queries": {"is_causal": True},
    "mask of each head": {"attn_mask": torch.rand(2, 2, 3, 5) > 0.3},
    "mask of keys": {"attn_mask": torch.tensor([[True, True, False, True, False]])},
    "added mask of each batch": {"attn_mask": torch.randn(2, 1, 3, 5, dtype=torch.float64)},
}


@pytest.mark.parametrize("case", CASES)
def test_as_torchs_kernel(case):
    """Value and gradients, which are torch's own there, and the gradients by blocks beside them."""
    qkv = arguments(2, 2)
    g = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    results = []
    for f in (ours.scaled_dot_product_attention, F.scaled_dot_product_attention):
        y = f(*qkv, **CASES[case])
        results.append((y, *torch.autograd.grad(y, qkv, g)))
    with torch.enable_grad():
        y = ours.scaled_dot_product_attention(*qkv, **CASES[case])
        results.append((y, *torch.autograd.grad(y, qkv, g, create_graph=True)))
    assert_close(results[0], results[1], rtol=1e-11, atol=1e-13)
    assert_close(results[2], results[1], rtol=1e-11, atol=1e-13)


def test_blocks_of_rows_are_parts_of_the_whole(monkeypatch):
    """One row of each head at a time, or all: the same numbers, of every derivative."""
    q, k, v = arguments(2, 2, length=4, keys=4)
    mask = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def derivatives():
        y = ours.scaled_dot_product_attention(q, k, v, mask)
        first = torch.autograd.grad(y.sin().sum(), (q, k, v, mask), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v, mask))
        _, tangent = torch.func.jvp(
            lambda q: ours.scaled_dot_product_attention(q, k.detach(), v.detach(), mask.detach()),
            (q.detach(),),
            (q.detach().cos(),),
        )
        return y, first, second, tangent

    whole = derivatives()
    monkeypatch.setattr(attention, "BLOCK", 1)
    assert_close(derivatives(), whole, rtol=1e-11, atol=1e-13)


def test_grouped_queries_share_keys():
    q = arguments(2, 6)[0]
    _, k, v = arguments(2, 3)
    g = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    results = []
    for keys, values, grouped in ((k, v, True), (k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), False)):
        for create_graph in (False, True):
            y = ours.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped)
            results.append((y, *torch.autograd.grad(y, (q, k, v), g, create_graph=create_graph, retain_graph=True)))
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-11, atol=1e-13)


def test_memory_is_linear_in_the_sequence():
    """No tensor of queries times keys is kept for backward, nor made by the second derivative."""
    n = 2 * attention.BLOCK // 1000
    q, k, v = (torch.randn(1, 1, size, 1, requires_grad=True) for size in (n, 1000, 1000))
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal largest
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    y = ours.scaled_dot_product_attention(q, k, v)
    with Largest():
        (g,) = torch.autograd.grad(y.sum(), q, create_graph=True)
        torch.autograd.grad(g.sum(), k)
    assert n < largest <= attention.BLOCK


@pytest.mark.parametrize("keys", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_query_of_nan(keys, dtype):
    """torch 2.13 and 2.14 return 0 for it on CPU where there are fewer keys than a vector holds."""
    q, k, v = (x.detach() for x in arguments(1, 2, keys=keys, dtype=dtype))
    q[0, 0, 1, 2] = torch.nan
    y = ours.scaled_dot_product_attention(q, k, v)
    assert y.isnan().sum() == 4 and y[0, 0, 1].isnan().all()


def test_keys_without_values_are_refused():
    q, k, v = arguments(1, 2)
    for short in (v[..., :4, :], v[:, :1, :2]):
        with pytest.raises(RuntimeError, match=r"key has 5 rows and value [24].*each key needs its value"):
            ours.scaled_dot_product_attention(q, k, short)


def test_dropout_is_torchs():
    qkv = arguments(1, 2)
    torch.manual_seed(0)
    y = ours.scaled_dot_product_attention(*qkv, dropout_p=0.5)
    torch.manual_seed(0)
    assert_close(y, F.scaled_dot_product_attention(*qkv, dropout_p=0.5))


@pytest.mark.filterwarnings("ignore:.*(nested|prototype)")
def test_nested_tensors_are_torchs():
    x = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)], layout=torch.jagged)
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    for mine, theirs in zip(
        ours.scaled_dot_product_attention(q, q, q).unbind(),
        F.scaled_dot_product_attention(q, q, q).unbind(),
        strict=True,
    ):
        assert_close(mine, theirs)
