import gc

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchcalc.functional as ours
import torchcalc.nn
from tests import stock
from tests.functions import table


@table("mlp")
def test_mlp(row, check):
    check(row)


@table("gated_mlp")
def test_gated_mlp(row, check):
    check(row)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, recompute):
    f = ACTIVATIONS[activation]
    shapes = (7, 4), (6, 4), (6, 4), (3, 6)
    x, w, w_up, w_down = leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    how = {"activation": activation, "recompute": recompute}
    pairs = [(ours.mlp(x, w, w_down, **how), F.linear(f(F.linear(x, w)), w_down), (x, w, w_down))]
    if activation not in ("sigmoid", "tanh"):
        gated = F.linear(f(F.linear(x, w)) * F.linear(x, w_up), w_down)
        pairs.append((ours.gated_mlp(*leaves, **how), gated, leaves))
    for mine, theirs, over in pairs:
        g = torch.randn_like(mine)
        assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
        grads = torch.autograd.grad(mine, over, g), torch.autograd.grad(theirs, over, g)
        assert_close(*grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_rounding(gated, dtype):
    """In 16 bits the error against float64 is at most that of torch's operations, which round twice more on the way."""
    torch.manual_seed(0)
    shapes = [(64, 16), (48, 16), *([(48, 16)] if gated else []), (24, 48)]
    small = [(torch.randn(s, dtype=torch.float64) / (1 if k == 0 else 4)).to(dtype) for k, s in enumerate(shapes)]
    g = torch.randn(64, 24, dtype=torch.float64).to(dtype)

    def stock(x, w, *rest):
        h = F.silu(F.linear(x, w))
        return F.linear(h * F.linear(x, rest[0]) if gated else h, rest[-1])

    def mine(*parts):
        return ours.gated_mlp(*parts) if gated else ours.mlp(*parts, activation="silu")

    results = []
    for f, leaves in ((mine, small), (stock, small), (stock, [a.double() for a in small])):
        leaves = [a.clone().requires_grad_() for a in leaves]
        y = f(*leaves)
        results.append([a.double() for a in (y, *torch.autograd.grad(y, leaves, g.to(y.dtype)))])
    for a, b, exact in zip(*results, strict=True):
        assert (a - exact).abs().mean() <= 1.03 * (b - exact).abs().mean()


def hidden_kept(f, size):
    """How many tensors of that size forward keeps."""
    kept = {}  # held, so that no address is used twice

    def pack(x):
        if x.numel() == size:
            kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = f()
    del y
    return len(kept)


def test_what_is_kept():
    n, d, h = 32, 8, 24
    x = torch.randn(n, d)
    w, w_up = (torch.randn(h, d, requires_grad=True) for _ in range(2))
    w_down = torch.randn(d, h, requires_grad=True)
    for recompute, count in ((False, 2), (True, 0)):
        assert hidden_kept(lambda r=recompute: ours.gated_mlp(x, w, w_up, w_down, recompute=r), n * h) == count
        assert hidden_kept(lambda r=recompute: ours.mlp(x, w, w_down, recompute=r), n * h) == count // 2
    assert hidden_kept(lambda: F.linear(F.silu(F.linear(x, w)) * F.linear(x, w_up), w_down), n * h) == 4


def test_a_frozen_part_costs_nothing():
    """Only what is asked for comes back, whichever parts are frozen."""
    x, w, w_up, w_down = parts = [torch.randn(s) for s in ((5, 4), (6, 4), (6, 4), (3, 6))]
    for mask in range(1, 16):
        leaves = [p.clone().requires_grad_(bool(mask >> i & 1)) for i, p in enumerate(parts)]
        over = [p for p in leaves if p.requires_grad]
        x, w, w_up, w_down = leaves
        y = F.linear(F.silu(F.linear(x, w)) * F.linear(x, w_up), w_down)
        g = torch.randn_like(y)
        assert_close(
            torch.autograd.grad(ours.gated_mlp(*leaves), over, g), torch.autograd.grad(y, over, g), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("hooks", [False, True])
def test_hidden_tensors_are_let_go_by_backward(hooks):
    """As torch's saved tensors are; and hooks may move them."""
    w = torch.randn(64, 8, requires_grad=True)
    w_down = torch.randn(8, 64, requires_grad=True)
    x = torch.randn(16, 8)
    context = torch.autograd.graph.save_on_cpu() if hooks else torch.enable_grad()
    with context:
        y = ours.mlp(x, w, w_down)
    first = torch.autograd.grad(y.sum(), w, retain_graph=True)
    y.sum().backward()
    assert_close(first[0], w.grad)
    gc.collect()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["MLP", "GatedMLP"])
@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_and_checkpoint(name, recompute):
    torch.manual_seed(0)
    mine = getattr(torchcalc.nn, name)(8, 16, bias=True, recompute=recompute)
    twin = getattr(stock, name)(8, 16, bias=True)
    twin.load_state_dict(mine.state_dict())
    x = torch.randn(4, 8)
    results = []
    for module in (mine, twin):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        results.append([p.grad for p in module.parameters()])
    assert all(g.dtype == torch.float32 for g in results[0])
    assert_close(*results, rtol=0.05, atol=2e-3)


def test_what_does_not_fit_is_named():
    x, w, w_down = torch.ones(2, 4), torch.ones(6, 4), torch.ones(3, 6)
    with pytest.raises(ValueError, match=r"activation='swish' is not known; use one of 'gelu'"):
        ours.mlp(x, w, w_down, activation="swish")
    with pytest.raises(ValueError, match="activation='tanh' is not known"):
        ours.gated_mlp(x, w, w, w_down, activation="tanh")
    with pytest.raises(ValueError, match="activation='tanh'"):
        torchcalc.nn.GatedMLP(4, 6, activation="tanh")
    with pytest.raises(RuntimeError, match=r"weight1 has shape \(6, 4\).*give one of shape \(6, 5\)"):
        ours.mlp(torch.ones(2, 5), w, w_down)
    with pytest.raises(RuntimeError, match=r"down_weight has shape \(3, 5\).*\(3, 6\)"):
        ours.gated_mlp(x, w, w, torch.ones(3, 5))
    with pytest.raises(RuntimeError, match=r"up_weight has shape \(5, 4\)"):
        ours.gated_mlp(x, w, torch.ones(5, 4), w_down)
    with pytest.raises(RuntimeError, match=r"up_bias has shape \(1,\).*\(6,\)"):
        ours.gated_mlp(x, w, w, w_down, up_bias=torch.ones(1))
