"""The functions of csrc/math.h, through kernels: over all scales, against mpmath.

The error is at most 1.5 units in the last place, or torch's of the same number; special numbers are exact.
"""

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import torchcalc.functional as ours
from torchcalc.formula.pointwise import FORMULAS
from torchcalc.native import pointwise

inf, nan = torch.inf, torch.nan


def scales(dtype: torch.dtype, n: int = 12) -> Tensor:
    """Numbers of every exponent, subnormal ones too, of both signs."""
    bits, integer = (23, torch.int32) if dtype is torch.float32 else (52, torch.int64)
    top = 255 if bits == 23 else 2047
    random = torch.Generator().manual_seed(0)
    exponents = torch.arange(top).repeat_interleave(n)
    mantissas = torch.randint(1 << bits, exponents.shape, generator=random)
    x = ((exponents << bits) | mantissas).to(integer).view(dtype)
    return torch.cat([x, -x])


def around(low: float, high: float, dtype: torch.dtype, n: int = 3000) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64).to(dtype)


def test_these_are_the_kernels() -> None:
    for name in ("Exp", "Log", "ELU", "Softplus", "Tanh", "Sigmoid", "GELU", "Abs"):
        assert pointwise.index(FORMULAS[name]) >= 0, f"{name} has no kernel of this formula; build them"


# name: (ours, torch's, truth, the interval where it is neither 0, 1 nor infinite)
def logistic(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Any], Any], tuple[float, float]]] = {
    "exp": (ours.exp, torch.exp, mpmath.exp, (-110, 90)),
    "log": (ours.log, torch.log, mpmath.log, (0, 3)),
    "expm1": (ours.elu, torch.expm1, mpmath.expm1, (-20, 0)),
    "log1p of exp": (
        lambda x: ours.softplus(x, threshold=1e30),
        lambda x: torch.nn.functional.softplus(x, threshold=80),
        lambda x: mpmath.log1p(mpmath.exp(x)),
        (-100, 30),
    ),
    "tanh": (ours.tanh, torch.tanh, mpmath.tanh, (-10, 10)),
    "sigmoid": (ours.sigmoid, torch.sigmoid, logistic, (-90, 20)),
    "erfc": (
        lambda x: ours.gelu(x),
        torch.nn.functional.gelu,
        lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2 if abs(x) < 99 else max(x, 0),
        (-6, 6),
    ),
    "abs": (ours.abs, torch.abs, abs, (-1, 1)),
}  # fmt: skip


def errors(y: Tensor, x: Tensor, truth: Callable[[Any], Any]) -> Tensor:
    """In units in the last place of the true value."""
    info = torch.finfo(x.dtype)
    bits = 24 if x.dtype is torch.float32 else 53
    found = []
    with mpmath.workdps(60):
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            t = mpmath.mpmathify(truth(mpmath.mpf(a)))
            if isinstance(t, mpmath.mpc):
                assert b != b
                found.append(0.0)
                continue
            if abs(t) > info.max:
                assert b == (inf if t > 0 else -inf) or abs(b) == info.max
                found.append(0.0)
                continue
            exponent = max(mpmath.frexp(t)[1] - bits, -149 if bits == 24 else -1074) if t else -1074
            unit = mpmath.ldexp(1, exponent)
            found.append(float(abs(mpmath.mpf(b) - t) / unit))
    return torch.tensor(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_error(name: str, dtype: torch.dtype) -> None:
    """gelu rounds erfc's argument z = x·√½ by up to a unit, which changes erfc by up to 2z² = x² of its relative error."""
    f, stock, truth, (low, high) = FUNCTIONS[name]
    wide = 1 if dtype is torch.float32 else 6
    x = torch.cat(
        [scales(dtype, 4 if dtype is torch.float32 else 1), around(low * wide if low < -50 else low, high, dtype)]
    )
    x = x[x > 0] if name == "log" else x[x <= 0] if name == "expm1" else x
    mine, theirs = errors(f(x), x, truth), errors(stock(x), x, truth)
    bound = 4 + 2 * x.double().square() if name == "erfc" else torch.tensor(1.5).double()
    worse = mine > torch.maximum(theirs.double(), bound)
    assert not worse.any(), (x[worse][:5], mine[worse][:5], theirs[worse][:5])


SPECIAL = {
    "exp": ([inf, -inf, 0.0, -0.0, 1e30, -1e30], [inf, 0.0, 1.0, 1.0, inf, 0.0]),
    "log": ([inf, 0.0, -0.0, 1.0, -1.0, -inf], [inf, -inf, -inf, 0.0, nan, nan]),
    "expm1": ([-inf, 0.0, -0.0, -1e30], [-1.0, 0.0, -0.0, -1.0]),
    "log1p of exp": ([inf, -inf, 1e30, -1e30], [inf, 0.0, 1e30, 0.0]),
    "tanh": ([inf, -inf, 0.0, -0.0, 1e30, -1e30], [1.0, -1.0, 0.0, -0.0, 1.0, -1.0]),
    "sigmoid": ([inf, -inf, 0.0, 1e30, -1e30], [1.0, 0.0, 0.5, 1.0, 0.0]),
    "erfc": ([inf, 0.0, -0.0, 1e30, -1e30], [inf, 0.0, -0.0, 1e30, -0.0]),
    "abs": ([inf, -inf, -0.0], [inf, inf, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_numbers(name: str, dtype: torch.dtype) -> None:
    """In vectors and in their tails; -0 is not 0."""
    x, expected = (torch.tensor(v * 11, dtype=dtype) for v in SPECIAL[name])
    y = FUNCTIONS[name][0](x)
    assert torch.equal(y.nan_to_num(12345), expected.nan_to_num(12345))
    assert torch.equal(y.signbit()[~expected.isnan()], expected.signbit()[~expected.isnan()])
    assert FUNCTIONS[name][0](torch.full((37,), nan, dtype=dtype)).isnan().all()
