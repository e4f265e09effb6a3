"""Pointwise kernels, against torch and float64: on a GPU (`make test-cuda`), or in Triton's interpreter, where
test_triton.py runs them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchcalc.functional  # noqa: F401  which defines the formulas
from tests.interpreter import mend
from torchcalc.formula import Expression, maximum, minimum, where
from torchcalc.formula.launch import fits, launch_loss, launch_loss_product, launch_product, launch_value, launch_whole
from torchcalc.formula.pointwise import FORMULAS, gradients
from torchcalc.native import gpu

if gpu.INTERPRETED:
    mend()
DEVICE = "cpu" if gpu.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


@dataclass(frozen=True, eq=False)
class Formula:
    name: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    expression: Expression
    products: tuple[Expression | None, ...]


x, t, w, y, g = map(Expression.input, ("x", "t", "w", "y", "g"))
alpha = Expression.parameter("alpha")
s = x.sigmoid()
phi = 0.5 * (-x * 0.7071067811865476).erfc()

SILU = Formula("silu", ("x",), (), x * s, (g * (s * (1 + x * (1 - s))),))
GELU = Formula("gelu", ("x",), (), x * phi, (g * (phi + x * (-0.5 * x * x).exp() * 0.3989422804014327),))
TANH = Formula("tanh", ("x",), (), x.tanh(), (g * (1 - y * y),))
ELU = Formula("elu", ("x",), ("alpha",), where(x > 0, x, alpha * x.expm1()), (where(x > 0, g, g * (alpha * x.exp())),))
RELU6 = Formula("relu6", ("x",), (), minimum(maximum(x, 0), 6), (where((x > 0) & (x < 6), g, 0),))
SOFTPLUS = Formula("softplus", ("x",), (), maximum(x, 0) + (-abs(x)).exp().log1p(), (g * x.sigmoid(),))
MSE = Formula("mse", ("x", "t"), (), (x - t).square(), (g * (2 * (x - t)), g * (2 * (t - x))))
WEIGHTED = Formula("weighted", ("x", "t", "w"), (), w * abs(x - t), (g * (w * (x - t).sgn()), None, None))

STOCK = {
    SILU: F.silu,
    GELU: F.gelu,
    TANH: torch.tanh,
    ELU: lambda v: F.elu(v, 0.7),
    RELU6: F.relu6,
    SOFTPLUS: F.softplus,
}
PARAMETERS = {ELU: (0.7,)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SAVES_OUTPUT = (TANH,)


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    return (3 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def close(mine: Tensor, stock: Tensor, truth: Tensor) -> None:
    """At most stock's own error, or one unit in the last place of the largest."""
    scale = truth.abs().max()
    error = (mine.double() - truth).abs().max()
    assert mine.dtype == stock.dtype and mine.shape == stock.shape and mine.stride() == stock.stride()
    assert error <= max((stock.double() - truth).abs().max(), torch.finfo(mine.dtype).eps * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("formula", STOCK, ids=lambda f: f.name)
@pytest.mark.parametrize("n", [1, 1024, 1500])
def test_value_and_product(formula: Formula, dtype: torch.dtype, n: int) -> None:
    a = values(dtype, n).requires_grad_()
    numbers = PARAMETERS.get(formula, ())
    stock = STOCK[formula](a)
    incoming = values(dtype, n)
    stock.backward(incoming)
    exact = a.detach().double().requires_grad_()
    truth = STOCK[formula](exact)
    truth.backward(incoming.double())
    assert fits([a])
    mine = launch_value(formula, [a.detach()], numbers)
    close(mine, stock.detach(), truth.detach())
    saved = [None, mine] if formula in SAVES_OUTPUT else [a.detach(), None]
    product = launch_product(formula, 0, incoming, saved, numbers)
    allowed = torch.finfo(dtype).eps * 4 if formula in SAVES_OUTPUT else 0  # the output was rounded
    assert (product.double() - exact.grad).abs().max() <= allowed * incoming.abs().max() + max(
        (a.grad.double() - exact.grad).abs().max(), 4 * torch.finfo(dtype).eps * exact.grad.abs().max()
    )


@pytest.mark.parametrize("formula", STOCK, ids=lambda f: f.name)
def test_what_is_not_finite(formula: Formula) -> None:
    a = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40])
    mine = launch_value(formula, [a], PARAMETERS.get(formula, ()))
    torch.testing.assert_close(mine, STOCK[formula](a.double()).float(), equal_nan=True)  # gelu(inf) is nan in float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 1000, 5000])
def test_loss(dtype: torch.dtype, n: int) -> None:
    a, target = values(dtype, n).requires_grad_(), values(dtype, n)
    stock = F.mse_loss(a, target)
    stock.backward(torch.tensor(3.0, dtype=dtype))
    exact = a.detach().double().requires_grad_()
    truth = F.mse_loss(exact, target.double())
    truth.backward(torch.tensor(3.0))
    saved = [a.detach(), target]
    loss = launch_loss(MSE, saved, scale=1 / n)
    close(loss, stock.detach(), truth.detach())
    assert torch.equal(loss, launch_loss(MSE, saved, scale=1 / n))
    slope = launch_loss_product(MSE, 0, torch.tensor(3.0, dtype=dtype), saved, scale=1 / n)
    close(slope, a.grad, exact.grad)
    of_target = launch_loss_product(MSE, 1, torch.tensor(3.0, dtype=dtype), saved, scale=1 / n)
    assert torch.equal(of_target, -slope)


def test_a_weighted_loss_of_several_dtypes() -> None:
    a, target, weight = values(torch.bfloat16, 40), values(torch.bfloat16, 40), torch.rand(40)
    loss = launch_loss(WEIGHTED, [a, target, weight])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (weight * (a.float() - target.float()).abs()).sum())
    with pytest.raises(ValueError, match="no gradient for 't'"):
        launch_loss_product(WEIGHTED, 1, loss, [a, target, weight])


def test_an_empty_tensor() -> None:
    empty = torch.empty(0, 3)
    assert launch_value(SILU, [empty]).shape == (0, 3)
    assert launch_product(SILU, 0, empty, [empty, None]).shape == (0, 3)
    assert launch_loss(MSE, [empty, empty]) == 0
    assert launch_loss(MSE, [empty, empty], scale=math.inf).isnan()  # torch's mean of nothing


def test_a_product_that_lacks_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"needs \['x'\]"):
        launch_product(SILU, 0, torch.ones(3), [None, torch.ones(3)])


def test_layouts() -> None:
    plain = torch.randn(2, 3, 4, 5)
    last = plain.to(memory_format=torch.channels_last)
    assert fits([plain, plain.clone()]) and fits([last, last.clone()]) and fits([plain.mT])
    assert not fits([plain, last])
    assert not fits([plain[:, :, ::2]])
    assert not fits([plain[:1].expand(2, 3, 4, 5)])
    assert not fits([plain.long()])
    assert not fits([torch.view_as_complex(torch.randn(4, 2)).conj().imag])  # it negates when read
    mine = launch_value(SILU, [last])
    assert mine.stride() == last.stride()
    torch.testing.assert_close(mine, F.silu(last))


def test_an_address_that_is_not_aligned() -> None:
    a = torch.randn(2049)[1:]
    torch.testing.assert_close(launch_value(SILU, [a]), F.silu(a))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name, formula in FORMULAS.items() if formula.whole])
def test_gradients_and_value_together(name: str, dtype: torch.dtype) -> None:
    """What mlp and gated_mlp launch in backward, against the formula's own value and products."""
    formula = FORMULAS[name]
    for n in (1, 1500):
        g, *inputs = (torch.randn(n, dtype=torch.float64).to(dtype) for _ in range(1 + len(formula.inputs)))
        *grads, value = launch_whole(formula, g, inputs)
        right = formula.on_tensors(*inputs)
        known = dict(zip(formula.inputs, inputs, strict=True)) | {"y": right}
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(value, right, rtol=8 * eps, atol=8 * eps)
        found = gradients(formula, g, known, [True] * len(inputs), [(g.shape, dtype)] * len(inputs))
        for a, b in zip(grads, found, strict=True):
            torch.testing.assert_close(a, b, rtol=16 * eps, atol=16 * eps)
