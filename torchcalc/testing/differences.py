"""Derivatives by Richardson extrapolation of central differences, each with an estimate of its own error.

    D(h) = (f(x + h·u) - f(x - h·u)) / 2h = f'·u + c₂h² + c₄h⁴ + ...                (1)

Halving h and combining, D(h/2) + (D(h/2) - D(h)) / (4ʲ - 1), removes the term of order h²ʲ. (2)
Every entry of the tableau is compared with the two that it was made of. The larger difference and the rounding 2ε·|f|/h
are its error bar, and the entry with the smallest one wins. (3)

The same evaluations give the two one-sided slopes. If these still differ when h goes to 0, x is a kink (or a jump):
(1) does not hold there, any slope between the two is right, and the point is left out by name. (4)

Reference: Ridders 1982, "Accurate computation of F'(x) and F'(x)F''(x)", Adv. Eng. Software 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Slopes", "element_slopes", "slopes_along"]

STEPS = tuple(2.0**-k for k in range(4, 12))


@dataclass(frozen=True)
class Slopes:
    """Derivatives along some directions, or of some outputs, all tensors of one shape.

    Attributes:
        value: the derivative.
        error: its error bar; infinite where f was not finite.
        left, right: the one-sided slopes, from the smallest steps.
        kink: where these differ, so that value means nothing.
    """

    value: Tensor
    error: Tensor
    left: Tensor
    right: Tensor
    kink: Tensor

    @property
    def usable(self) -> Tensor:
        return self.error.isfinite() & ~self.kink


def richardson(plus: Tensor, minus: Tensor, h: Tensor, noise: Tensor) -> Slopes:
    """From f(x ± h) - f(x), of shape (steps, n), to n derivatives; noise is the rounding error of f."""
    central = (plus - minus) / (2 * h)  # (1)
    best = torch.full_like(noise, torch.nan)
    error = torch.full_like(noise, torch.inf)
    above = [central[0]]
    for i in range(1, len(central)):
        row = [central[i]]
        for j in range(1, i + 1):
            row.append(row[-1] + (row[-1] - above[j - 1]) / (4**j - 1))  # (2)
            e = torch.maximum((row[j] - row[j - 1]).abs(), (row[j] - above[j - 1]).abs()) + 2 * noise / h[i]  # (3)
            better = e < error
            best, error = torch.where(better, row[j], best), torch.where(better, e, error)
        above = row
    return Slopes(best, error, *one_sided(plus, minus, h, noise))


def one_sided(plus: Tensor, minus: Tensor, h: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(left, right, kink), extrapolated linearly from the two smallest steps."""
    right, left = plus[-2:] / h[-2:], -minus[-2:] / h[-2:]
    right, left = 2 * right[1] - right[0], 2 * left[1] - left[0]
    jump = (right - left).abs()
    return left, right, jump > 1e-3 * (right.abs() + left.abs()) + 100 * noise / h[-1]  # (4)


def sample(f: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(x + h·u) - f(x) and f(x - h·u) - f(x) for all steps, and f(x); NaN where f raises."""
    center = f(x)
    nothing = torch.full_like(center, torch.nan)

    def difference(h: float) -> Tensor:
        try:
            return f(x + h * u) - center
        except (RuntimeError, ValueError):  # beyond the domain, and it says so
            return nothing

    return torch.stack([difference(h) for h in STEPS]), torch.stack([difference(-h) for h in STEPS]), center


def slopes_along(f: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> Slopes:
    """The derivative of each output of f along u, the outputs as a vector.

    >>> slopes = slopes_along(torch.sin, torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2).double())
    >>> torch.allclose(slopes.value, torch.tensor([0.0, 1.0]).double().cos(), rtol=0, atol=1e-11)
    True
    """
    plus, minus, center = sample(f, x, u)
    h = torch.tensor(STEPS, dtype=plus.dtype, device=plus.device).unsqueeze(-1).expand_as(plus)
    return richardson(plus, minus, h, torch.finfo(center.dtype).eps * center.abs())


def element_slopes(
    f: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor, indices: Sequence[int] | None = None
) -> Slopes:
    """The derivative of the weighted sum of the outputs of f by each element of x (or those of some flat indices).

    The steps are relative to the element where it is larger than 1.
    """
    indices = range(x.numel()) if indices is None else indices
    plus, minus, scales = [], [], []
    noise = x.new_zeros(())
    for k in indices:
        scale = max(1.0, abs(x.reshape(-1)[k].item()))
        u = torch.zeros_like(x, memory_format=torch.contiguous_format)
        u.view(-1)[k] = scale
        above, below, center = sample(f, x, u)
        noise = torch.finfo(center.dtype).eps * (weights * center).abs().sum()
        live = weights != 0  # so that a NaN of weight 0 is out
        plus.append(above[:, live] @ weights[live])
        minus.append(below[:, live] @ weights[live])
        scales.append(scale)
    p, m = torch.stack(plus, 1), torch.stack(minus, 1)
    h = torch.tensor(STEPS, dtype=p.dtype, device=p.device).unsqueeze(1) * torch.tensor(
        scales, dtype=p.dtype, device=p.device
    )
    return richardson(p, m, h, noise.to(p.dtype).expand(len(scales)))
