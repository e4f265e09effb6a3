"""Slopes of functions by differences, each with an error bar, for the checks: along a direction, or of each element.

:mod:`torchcalc.calculus.extrapolation` makes a slope and its error of values at halving steps; here it is decided where
to take these. Eight steps from 1/16 to 1/2048 of the scale of x, and two of 10⁻⁵ that only confirm the result, do for
most functions. Where that leaves a relative error above ROUGH, or shows a kink, the function has another scale, as √x
at 10⁻⁵ or tanh(10⁴x): there steps shrink from a quarter to √ε of max(|x|, 1), and if that does not do either, of |x|, or
of 1 where |x| is larger. The result with the smallest error is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchcalc.calculus.extrapolation import Slopes, extrapolate, halving, precision
from torchcalc.testing.subject import CLEAR

__all__ = ["Slopes", "element_slopes", "slopes_along"]

STEPS = (*(2.0**-k for k in range(4, 12)), 2.0**-17, 2.0**-18)
ROUGH = 1e-6  # relative error beyond which other steps are tried
NEAREST = 1e-6  # scale, relative to x, below which the steps would be a few ulp of x
Function = Callable[[Tensor], Tensor]


def attempt(f: Function, x: Tensor, like: Tensor) -> Tensor:
    """f(x), or NaN where f says that x is outside of its domain."""
    try:
        return f(x)
    except (*CLEAR, ArithmeticError):
        return torch.full_like(like, torch.nan)


def ladder(dtype: torch.dtype) -> list[float]:
    return halving(0.25, torch.finfo(dtype).eps ** 0.5)


def rounding(plus: Tensor, minus: Tensor, apart: int, least: float) -> Tensor:
    """The rounding error of f from its values at x ± h; that of float32 shows only where steps are short enough."""
    size = torch.maximum(plus.abs(), minus.abs()).nan_to_num(0, 0).clamp(min=least)
    return (precision(torch.cat([plus, minus])) if apart == 1 else torch.finfo(size.dtype).eps) * size


def rough(slopes: Slopes, size: Tensor) -> Tensor:
    """Where other steps may do better."""
    bound = max(ROUGH, torch.finfo(size.dtype).eps ** 0.5)
    return slopes.kink | ~(slopes.error <= bound * slopes.value.abs() + 1e-3 * bound * size)


def slopes_along(
    f: Function, x: Tensor, u: Tensor, scale: float | None = None, size: float = 0.0, jitter: Tensor | float = 0.0
) -> Slopes:
    """The derivative of each output of f along u, the outputs as a vector.

    Args:
        f: from a tensor like x to a vector.
        x, u: point and direction; the steps are fractions of u.
        scale: another scale that f may have along u, such as the least |x/u|; by default found from x and u.
        size: the least number that ε is relative to in the rounding error of f; 0 for that of f itself. A gradient has
            the rounding errors of the outputs, however small it is where these are flat.
        jitter: ε·|x/u|, by which x + h·u is rounded.

    >>> slopes = slopes_along(torch.sin, torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2).double())
    >>> torch.allclose(slopes.value, torch.tensor([0.0, 1.0]).double().cos(), rtol=0, atol=1e-11)
    True
    """
    center = f(x)
    if scale is None:
        scale = least_scale([x], [u])

    def by(steps: Sequence[float], apart: int) -> Slopes:
        plus, minus = (torch.stack([attempt(f, x + s * h * u, center) for h in steps]) for s in (1, -1))
        h = torch.tensor(steps, dtype=plus.dtype, device=plus.device).unsqueeze(-1)
        noise = rounding(plus, minus, apart, size)
        return extrapolate(plus - center, minus - center, torch.zeros_like(center), h, noise, apart, jitter)

    found = by(STEPS, 2)
    for times in (1.0, scale):
        if not times or not center.numel() or not rough(found, center.abs()).any():
            break
        found = found.better(by([times * h for h in ladder(center.dtype)], 1))
    return found


def least_scale(xs: Sequence[Tensor], us: Sequence[Tensor]) -> float | None:
    """The least |x/u|, where that is below 1 and not 0."""
    ratios = torch.cat([(x / u).abs().reshape(-1) for x, u in zip(xs, us, strict=True)])
    ratios = ratios[(ratios > 0) & ratios.isfinite()]
    least = float(ratios.min()) if ratios.numel() else 1.0
    return least if least < 1 else None


def element_slopes(
    f: Function, x: Tensor, weights: Tensor, indices: Sequence[int] | None = None, least: float = 0.0
) -> Slopes:
    """The derivative of the weighted sum of the outputs of f by each element of x (or those of some flat indices).

    The steps are relative to the element where it is larger than 1. Outputs that are not finite are left out.
    ``least`` is what ``size`` is to :func:`slopes_along`.
    """
    indices = list(range(x.numel()) if indices is None else indices)
    at = [x.reshape(-1)[k].item() for k in indices]
    center = f(x)
    live = (weights != 0) & center.isfinite()  # so that a NaN of weight 0 is out
    places = torch.tensor(at, dtype=center.dtype, device=x.device).abs()
    part_of: dict[int, Tensor] = {}
    w, values = weights[live].to(center.dtype), center[live]

    def by(steps: Sequence[float], scales: Sequence[float], which: Sequence[int], apart: int) -> Slopes:
        plus, minus, noises = [], [], []
        for n in which:
            u = torch.zeros_like(x, memory_format=torch.contiguous_format)
            u.view(-1)[indices[n]] = scales[n]
            above, below = (torch.stack([attempt(f, x + s * h * u, center)[live] for h in steps]) for s in (1, -1))
            plus.append((above - values) @ w)
            minus.append((below - values) @ w)
            if n not in part_of:  # outputs that do not depend on this element have no part in the rounding
                probe = x.clone()
                probe.view(-1)[indices[n]] = torch.nan
                part_of[n] = attempt(f, probe, center)[live].isnan()
            moved = part_of[n] | ((above != values) | (below != values)).any(0)
            noises.append(rounding(above, below, apart, least) @ (w.abs() * moved))
        p, m, noise = (torch.stack(rows, 1) for rows in (plus, minus, noises))
        widths = torch.tensor([scales[n] for n in which], dtype=p.dtype, device=p.device)
        h = torch.tensor(steps, dtype=p.dtype, device=p.device).unsqueeze(1) * widths
        return extrapolate(
            p, m, torch.zeros_like(p[0]), h, noise, apart, torch.finfo(values.dtype).eps * places[list(which)]
        )

    if not indices:
        empty = values.new_zeros(0)
        return Slopes(empty, empty, empty, empty, empty.bool(), empty, empty)
    size = (w * values).abs().sum()
    wide = [max(1.0, abs(a)) for a in at]
    near = [abs(a) if 0 < abs(a) < 1 else max(1.0, NEAREST * abs(a)) for a in at]
    found = by(STEPS, wide, range(len(at)), 2)
    for scales in (wide, near):
        which = rough(found, size / torch.tensor(wide, dtype=found.value.dtype, device=size.device)).nonzero()
        again = [n for n in which.reshape(-1).tolist() if scales is wide or scales[n] != wide[n]]
        if not again:
            continue
        finer = by(ladder(values.dtype), scales, again, 1)
        part = Slopes(*(getattr(found, name)[again] for name in found.__dataclass_fields__)).better(finer)
        for name in found.__dataclass_fields__:
            getattr(found, name)[again] = getattr(part, name)
    return found
