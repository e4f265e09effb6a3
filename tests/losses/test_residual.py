"""What mse, l1 and huber share: broadcasting, dtypes, weights that are not in the table."""

import pytest
import torch
from torch.testing import assert_close

import torchcalc.functional as ours
from tests.functions import normal

F = torch.nn.functional
LOSSES = ["mse_loss", "l1_loss", "huber_loss"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_gradients_of_broadcast_arguments_are_sums(name):
    """Against the same loss of arguments that are repeated by hand."""
    x, t = torch.linspace(-2, 2, 3, dtype=torch.float64)[:, None], torch.linspace(-1, 3, 4, dtype=torch.float64)
    leaves = x.clone().requires_grad_(), t.clone().requires_grad_()
    grads = torch.autograd.grad(getattr(ours, name)(*leaves), leaves)
    full = x.repeat(1, 4).requires_grad_(), t.repeat(3, 1).requires_grad_()
    gx, gt = torch.autograd.grad(getattr(F, name)(*full), full)
    assert_close(grads, (gx.sum(1, keepdim=True), gt.sum(0)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "dtypes", [("float32", "float64"), ("float64", "float32"), ("bfloat16", "float32"), ("float32", "int64")]
)
def test_mixed_dtypes(name, dtypes):
    """As of the arguments in their common dtype, in which torch computes too; some of its backwards fail then."""
    x, t = (torch.tensor([0.5, -2.0, 3.0]).to(getattr(torch, d)) for d in dtypes)
    common = torch.promote_types(x.dtype, t.dtype)
    leaves = [a.clone().requires_grad_(a.is_floating_point()) for a in (x, t)]
    wide = [a.to(common).requires_grad_() for a in (x, t)]
    loss, expected = getattr(ours, name)(*leaves), getattr(F, name)(*wide)
    assert loss.dtype == getattr(F, name)(x, t).dtype
    assert_close(loss, expected.to(loss.dtype))
    for leaf, other in zip(leaves, torch.autograd.grad(expected, wide), strict=True):
        if leaf.requires_grad:
            assert_close(torch.autograd.grad(loss, leaf, retain_graph=True)[0], other.to(leaf.dtype))
    tangent = torch.func.jvp(lambda x: getattr(ours, name)(x, t), (x,), (torch.ones_like(x),))[1]
    assert_close(tangent, torch.autograd.grad(getattr(F, name)(*wide), wide[0])[0].sum().to(loss.dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_a_weighted_loss_is_float32_under_autocast(name):
    """torch's CPU autocast leaves out the product with the weight; its CUDA autocast has float32, as here."""
    x = torch.tensor([0.5, -2.0], dtype=torch.bfloat16, requires_grad=True)
    w = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = getattr(ours, name)(x, torch.zeros_like(x), weight=w)
    y.backward()
    assert (y.dtype, x.grad.dtype) == (torch.float32, torch.bfloat16)
    assert_close(y, getattr(F, name)(x.float(), torch.zeros(2), weight=w.float()))


def test_l1_of_complex_numbers():
    z = torch.tensor([3 + 4j, 0, -1j], dtype=torch.complex128)
    results = []
    for f in (ours.l1_loss, F.l1_loss):
        leaf, target = z.clone().requires_grad_(), torch.zeros_like(z).requires_grad_()
        y = f(leaf, target)
        results.append((y, torch.autograd.grad(y, (leaf, target))))
    assert_close(*results)
    away = (z + 1).requires_grad_(), (z * 0 - 1).requires_grad_()
    assert torch.autograd.gradcheck(ours.l1_loss, away, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours.l1_loss, away)


def test_the_second_derivative_at_the_kink_of_huber_is_torchs():
    for f in (ours.huber_loss, F.huber_loss):
        x = torch.tensor([1.0, -1.0, 0.999, 2.0], dtype=torch.float64)
        h = torch.autograd.functional.hessian(lambda x, f=f: f(x, torch.zeros_like(x), "sum"), x)
        assert_close(h.diag(), torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_are_rounded_once(name, dtype):
    x, t = (normal(2000, seed=seed).to(dtype) for seed in (0, 1))
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    incoming = torch.tensor(0.7, dtype=dtype)
    (g,) = torch.autograd.grad(getattr(ours, name)(leaf, t, reduction="sum"), leaf, incoming)
    (true,) = torch.autograd.grad(getattr(F, name)(exact, t.double(), reduction="sum"), exact, incoming.double())
    assert (g == true.to(dtype)).float().mean() > 0.99  # float32 rounds to the other side once in thousands
