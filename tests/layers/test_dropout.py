"""For the same random numbers it is torch's; and for any it is a linear map whose derivative is itself."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torchcalc.functional as ours

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layouts(dtype):
    x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.mT,
        "strided": x[..., ::2],
        "number": x[0, 0, 0, 0],
        "empty": x[:0],
    }


def run(f, x, seed=3, **options):
    """(value, gradient, the generator's state after)."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    y = f(leaf, **options)
    state = torch.get_rng_state()
    return y.detach(), torch.autograd.grad(y, leaf, y.detach().cos())[0], state


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75, 1.0])
@pytest.mark.parametrize("layout", layouts(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_torchs_for_the_same_seed(dtype, layout, p):
    x = layouts(dtype)[layout]
    if layout == "strided":  # a copy of torch's order: which element gets which number is that of memory
        x = x.contiguous()
    (y, grad, state), (y2, grad2, state2) = (run(f, x, p=p) for f in (ours.dropout, F.dropout))
    assert torch.equal(state, state2)
    assert torch.equal(y == 0, y2 == 0)
    half = dtype in (torch.bfloat16, torch.float16)
    tolerance = 4 * torch.finfo(dtype).eps if half else 0  # torch rounds 1/(1 - p) to 16 bits
    assert_close(y, y2, rtol=tolerance, atol=0)
    assert_close(grad, grad2, rtol=tolerance, atol=tolerance)
    assert y.stride() == y2.stride()


def test_halves_are_rounded_once():
    x = torch.rand(1000).add(1).bfloat16()
    y, *_ = run(ours.dropout, x, p=0.1)
    kept = y != 0
    assert torch.equal(y[kept], (x.float() / 0.9).bfloat16()[kept])


@pytest.mark.parametrize("options", [{"training": False}, {"p": 0.0}])
def test_what_changes_nothing_returns_the_input(options):
    x = torch.randn(3)
    assert ours.dropout(x, **options) is x


def seeded(x):
    torch.manual_seed(0)
    return ours.dropout(x, 0.4)


def test_derivatives():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(seeded, x, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_under_vmap(randomness):
    x = torch.ones(50, 40)
    y = torch.func.vmap(lambda x: ours.dropout(x, 0.5), randomness=randomness)(x)
    assert bool((y[0] == y[1]).all()) == (randomness == "same")
    assert 0.3 < (y == 0).float().mean() < 0.7
    g = torch.func.vmap(torch.func.grad(lambda x: ours.dropout(x, 0.5).sum()), randomness=randomness)(x)
    assert set(g.unique().tolist()) == {0.0, 2.0}
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: ours.dropout(x, 0.5))(x)


def test_checkpoint_draws_the_same_again():
    x = torch.randn(100, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: ours.dropout(x, 0.5) * 1, x, use_reentrant=False)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g == 0, y == 0)


def test_compiled_it_is_torchs():
    x = torch.ones(1000)
    f = torch.compile(lambda x: ours.dropout(x, 0.25), backend="aot_eager", fullgraph=True)
    assert set(f(x).unique().tolist()) <= {0.0, 1 / 0.75, float(torch.tensor(1 / 0.75))}


def test_a_byte_an_element_is_kept():
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.element_size()) or x, lambda x: x):
        ours.dropout(torch.randn(10, requires_grad=True), 0.5)
    assert sizes == [1]
