"""The derivative as the limit that it is: secant slopes, and what can be had from them in floating point.

The slope of the secant through x and x + h is, by Taylor's theorem,

    (f(x + h) − f(x))/h = f' + h/2·f'' + O(h²),                                   (1)

plus what rounding contributes, about ε·|f|/h: it tends to f' as h shrinks, until h is about √ε, and then away again.
Central differences lose every odd term of Taylor's series; :mod:`~torchcalc.calculus.extrapolation` derives what removes
the even ones, the error bar and the kinks: (2) to (4) there.

Scale.  Steps shrink from a quarter of max(|x|, 1) to √ε. Where that leaves a relative error above 10⁻⁶, as of log at 10⁻⁸, with
its edge nearer than all steps, or of relu at 10⁻⁹, they are tried from a quarter to √ε of |x| as well, and the result with
the smaller error is taken.

Reference: Ridders 1982, doi:10.1016/S0141-1195(82)80057-0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcalc.calculus.extrapolation import extrapolate, precision

__all__ = ["NumericDerivative", "Secant", "SecantTable", "numeric_derivative", "secant_table"]

# h, relative to the scale of f, which is max(|x|, 1) or |x|; the smallest is √ε, or √ε·|x|, or 16 ulp of x
LARGEST = 0.25
ROUGH = 1e-6  # relative error beyond which the scale may be |x|


@dataclass(frozen=True)
class NumericDerivative:
    """A derivative by differences.

    Attributes:
        value: f'(x); nan where f was not finite on both sides of x.
        error: an estimate of |value − f'(x)|; inf where value is nan.
        step: the h of the smallest difference that value was made of.
        evaluations: calls of f.

    >>> found = numeric_derivative(lambda x: x**3, 2.0)
    >>> abs(found.value.item() - 12) <= found.error.item() + 1e-12
    True
    """

    value: Tensor
    error: Tensor
    step: Tensor
    evaluations: int

    def __str__(self) -> str:
        if self.value.numel() == 1:
            return f"{self.value.item():.12g} ± {self.error.item():.1g}"
        return f"{self.value} ± {self.error}"


def numeric_derivative(f: Callable[[Any], Any], x: Tensor | float) -> NumericDerivative:
    """The derivative of a function of one real variable, from its values alone, with an estimate of the error.

    Args:
        f: takes a 0-d float64 tensor and returns a tensor of any shape, or a number; called about 50 times for each
            element of x, or 100 times near 0. It need not be differentiable by torch; where it raises ValueError,
            RuntimeError or an arithmetic error (outside its domain) it counts as nan. One that computes in float32 gets
            fewer digits.
        x: float tensor, f' is taken at every element of it, or a number.

    Returns:
        :class:`NumericDerivative`, tensors of the shape of x followed by that of what f returns.

    Raises:
        TypeError: x is not real and float. ValueError: x is empty or not finite, or f raises or is not a real number at x.

    Reference: Ridders 1982, doi:10.1016/S0141-1195(82)80057-0.

    >>> found = numeric_derivative(torch.exp, 0.0)
    >>> round(found.value.item(), 12), found.error.item() < 1e-12
    (1.0, True)
    """
    if isinstance(x, Tensor) and not x.is_floating_point():
        raise TypeError(f"x: {x.dtype} is no real variable; pass a float tensor")
    x = x.detach().double() if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)
    if not x.numel() or not bool(x.isfinite().all()):
        raise ValueError(f"x: {x.tolist() if x.numel() <= 8 else 'it'} must be finite, and at least one element")
    found = [_at(f, t) for t in x.reshape(-1)]
    *parts, evaluations = zip(*found, strict=True)
    value, error, step = (torch.stack(part).reshape(x.shape + part[0].shape) for part in parts)
    return NumericDerivative(value, error, step, sum(evaluations))


def _at(f: Callable[[Any], Any], x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(value, error, step, evaluations) at one x."""
    with torch.no_grad():
        center = _value(f(x), x)
        size = abs(float(x))
        value, error, step, evaluations = _ladder(f, x, center, max(size, 1.0))
        if 0 < size < 1 and not bool((error <= ROUGH * value.abs()).all()):
            *near, more = _ladder(f, x, center, size)
            better = near[1] < error
            value, error, step = (torch.where(better, b, a) for a, b in zip((value, error, step), near, strict=True))
            evaluations += more
    return value, error, step, 1 + evaluations


def _ladder(f: Callable[[Any], Any], x: Tensor, center: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same from steps that shrink from LARGEST·scale, without the evaluation at x."""
    eps = torch.finfo(center.dtype).eps
    largest, least = LARGEST * scale, max(eps**0.5 * min(scale, 1.0), 16 * torch.finfo(x.dtype).eps * abs(float(x)))
    count = round(math.log2(largest / least)) + 1
    hs = [(x + largest * 2.0**-k) - x for k in range(count)]  # as they are in floating point
    ups, downs = (torch.stack([_try(f, x + sign * h, center) for h in hs]) for sign in (1, -1))
    column = torch.stack(hs).reshape(-1, *[1] * center.dim())
    noise = precision(torch.cat([ups, downs])) * torch.maximum(ups.abs(), downs.abs()).nan_to_num(0, 0)
    found = extrapolate(ups, downs, center, column, noise)
    error = torch.maximum(found.error, torch.where(found.kink, found.gap / 2, 0))
    return found.value, error, found.step, 2 * count


def _value(y: Any, x: Tensor) -> Tensor:
    y = y.detach() if isinstance(y, Tensor) else torch.as_tensor(y, dtype=x.dtype, device=x.device)
    if not y.is_floating_point():
        raise ValueError(f"f returned {y.dtype}; a derivative needs real float values")
    return y


def _try(f: Callable[[Any], Any], x: Tensor, like: Tensor) -> Tensor:
    try:
        return _value(f(x), x)
    except (ArithmeticError, RuntimeError, ValueError):
        return torch.full_like(like, torch.nan)


class Secant(NamedTuple):
    """One row of a :class:`SecantTable`: the secant through x and x + h."""

    h: float
    x: float  #: x + h
    y: float  #: f(x + h)
    slope: float  #: (f(x + h) − f(x))/h


@dataclass(frozen=True)
class SecantTable:
    """Secant slopes of f at x as h shrinks; ``print`` shows the table.

    Attributes:
        x: where.
        y: f(x).
        rows: (h, x + h, f(x + h), slope) for each h.

    >>> secant_table(lambda x: x**2, 3.0, steps=(1, 0.5)).rows[-1].slope
    6.5
    """

    x: float
    y: float
    rows: tuple[Secant, ...]

    def __str__(self) -> str:
        rows = [(f"{h:.6g}", f"{x:.13g}", f"{y:.13g}", f"{slope:.10g}") for h, x, y, slope in self.rows]
        cells = [("h", "x + h", "f(x + h)", "slope"), *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([f"f({self.x:.10g}) = {self.y:.10g}", *lines])


def secant_table(
    f: Callable[[Any], Any],
    x: float,
    steps: Sequence[float] = (1, 0.1, 0.01, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14),
) -> SecantTable:
    """The slope of the secant from x to x + h, for each h: the limit (1), and where rounding ends it.

    Args:
        f: takes a 0-d float64 tensor and returns a number or a tensor of one element.
        x: a number, taken as float64.
        steps: h, not 0; negative ones come from the left.

    Raises:
        ValueError: a step is 0 or too small to change x.

    >>> print(secant_table(lambda x: x**2, 3.0, steps=(1, 0.1, 0.01, 1e-6, 1e-12)))
    f(3) = 9
        h           x + h        f(x + h)        slope
        1               4              16            7
      0.1             3.1            9.61          6.1
     0.01            3.01          9.0601         6.01
    1e-06        3.000001  9.000006000001  6.000001001
    1e-12  3.000000000001  9.000000000006  6.000533403
    """
    at = torch.tensor(float(x), dtype=torch.float64)
    with torch.no_grad():
        y = float(f(at))
        rows = []
        for h in steps:
            if h == 0 or x + h == x:
                raise ValueError(
                    f"steps: {h} does not change x = {x}; the smallest that does is about {abs(x) * 1.2e-16:.0e}"
                )
            z = float(f(at + h))
            rows.append(Secant(float(h), float(x) + h, z, (z - y) / h))
    return SecantTable(float(x), y, tuple(rows))
