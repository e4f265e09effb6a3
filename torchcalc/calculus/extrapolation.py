"""A slope, its error and its kinks, from the values of a function at x ± h for h that halves: Richardson and Ridders.

Central differences lose every odd term of Taylor's series, for the error of f(x + h) at +h is that of f(x − h) with the
other sign:

    D(h) = (f(x + h) − f(x − h))/2h = f' + c₂h² + c₄h⁴ + …                        (1)

Richardson.  D(h/2) has the same series with c₂/4, c₄/16, …, so

    D₁(h/2) = D(h/2) + (D(h/2) − D(h))/(4 − 1)       has no h² term, and again    (2)
    Dⱼ(h/2) = Dⱼ₋₁(h/2) + (Dⱼ₋₁(h/2) − Dⱼ₋₁(h))/(4ʲ − 1)    has none up to h²ʲ.   (2')

Ridders.  Every entry is compared with the two that it was made of. What they differ by is about the error of the worse
of the two, so it bounds that of the entry while (1) holds; h small makes it rounding, h large truncation. The entry of
the smallest error is returned:

    error = max(|Dⱼ(h) − Dⱼ₋₁(h)|, |Dⱼ(h) − Dⱼ₋₁(2h)|, C) + e/h.                   (3)

C guards against a limit that is none: far apart, the slopes of sin all are near 0, and agree. A value that is f' must
agree with the shorter secants, as far as these are exact themselves: C is the most by which |Dⱼ(h) − D₁(h')| exceeds
|D₁(h') − D(h')| + 4e/h' for h' < h. And e is the rounding error of f: ε·|f|, or more, if the last three D₁, where h is
so small that nothing else is left, scatter more: then e is the largest |D₁(h) − D₁(2h)|·h of them.

Kinks.  The one-sided slopes differ by G(h) = (f(x + h) − 2f(x) + f(x − h))/h = h·f'' + O(h³). If 2G(h/2) − G(h) does not
shrink for three steps below that of the entry, and is more than the error, x is a kink, as of |x| at 0: any slope between
the two is as good. Where f jumps, f(x + h) − f(x − h) does not shrink with h.    (4)

Reference: Ridders 1982, doi:10.1016/S0141-1195(82)80057-0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Slopes", "extrapolate", "halving", "precision"]

COLUMNS = 6  # of the tableau; more of them only add rounding
UNRESOLVED = 0.01  # scatter, relative to f, that is no rounding error: f oscillates between all steps
SCATTER = 3  # shortest secants whose scatter is the rounding error of f


@dataclass(frozen=True)
class Slopes:
    """Slopes of some functions at some points, all tensors of one shape.

    Attributes:
        value: the slope.
        error: its error bar; infinite where f was not finite.
        left, right: the one-sided slopes; NaN where they have no limit.
        kink: where these differ, so that value means nothing.
        gap: by how much they differ, or 0.
        step: the h of the shortest difference that value was made of.
    """

    value: Tensor
    error: Tensor
    left: Tensor
    right: Tensor
    kink: Tensor
    gap: Tensor
    step: Tensor

    @property
    def usable(self) -> Tensor:
        return self.error.isfinite() & ~self.kink

    def better(self, other: Slopes) -> Slopes:
        """At each place what has the smaller error, or, where they contradict each other, the shorter steps.

        What is no kink to either of them is none.
        """
        take = (other.error < self.error) | (self.kink & ~other.kink & other.error.isfinite())
        contradict = (self.value - other.value).abs() > 3 * (self.error + other.error)
        take = torch.where(contradict & ~self.kink & ~other.kink, other.step < self.step, take)
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__}
        found = Slopes(**{name: torch.where(take, b, a) for name, (a, b) in pairs.items()})
        sharp = contradict & ~take & other.kink & (other.step < self.step)  # longer steps have overlooked it
        return replace(found, kink=found.kink | sharp)


def halving(largest: float, least: float) -> list[float]:
    """The steps from largest down to about least."""
    count = 1
    while largest * 2.0**-count > 0.75 * least:
        count += 1
    return [largest * 2.0**-k for k in range(count)]


def extrapolate(
    plus: Tensor, minus: Tensor, center: Tensor, h: Tensor, noise: Tensor, apart: int = 1, jitter: Tensor | float = 0.0
) -> Slopes:
    """Slopes from values.

    Args:
        plus, minus: f(x + h) and f(x − h), of shape (steps, ...), NaN where f is not defined; or what these differ by
            from f(x), and ``center`` 0, where that is known better.
        center: f(x), of shape (...).
        h: the steps, each half of the one before, of a shape that broadcasts against ``plus``.
        noise: ε·|f|, the rounding error of f, of shape (steps, ...) or (...).
        apart: the last two steps may be shorter than the others by any factor. They then tell only whether the result
            and the noise hold: 1 if they do not stand apart, 2 if they do.
        jitter: ε·|x|, by which x + h is rounded. It moves f by as much times its slope.
    """
    h, noise = h.expand_as(plus), noise.expand_as(plus)
    ladder = len(h) - 2 if apart == 2 else len(h)
    columns = [(plus - minus) / (2 * h)]  # (1)
    for j in range(1, min(COLUMNS, ladder - 1) + 1):
        fine, coarse = columns[-1][1:], columns[-1][:-1]
        columns.append(fine + (fine - coarse) / (4**j - 1))  # (2')
    d0, d1 = columns[0], torch.cat([columns[0][:1], columns[1]])
    e = noise + jitter * d0[len(h) // 3 :].abs().nan_to_num(0, 0).amax(0)
    if apart == 1:
        scatter = ((d1[1:] - d1[:-1]).abs() * h[1:]).nan_to_num(0)
        e, wild = torch.maximum(e, scatter[-SCATTER:].amax(0)), scatter[-3 * SCATTER :].amax(0)
    trusted = (d1 - d0).abs() + 4 * e / h
    if apart == 2:  # the first of the last two is not half of the step before
        trusted[-2] = torch.inf
    lowest, highest = suffix(d1 + trusted, torch.cummin), suffix(d1 - trusted, torch.cummax)
    value, error = torch.full_like(center, torch.nan), torch.full_like(center, torch.inf)
    step = torch.full_like(center, torch.nan)
    for j in range(1, len(columns)):
        entries = columns[j][: ladder - j]
        worst = torch.maximum((entries - columns[j - 1][1 : ladder - j + 1]).abs(),
                              (entries - columns[j - 1][: ladder - j]).abs())  # fmt: skip
        shorter = slice(j + 1, ladder + 1)
        c = torch.maximum(entries - lowest[shorter], highest[shorter] - entries)
        candidates = torch.maximum(worst, c) + (e / h)[j:ladder]  # (3)
        candidates = torch.where(candidates.isnan(), torch.inf, candidates)
        least, at = candidates.min(0)
        chosen = entries.gather(0, at[None])[0]
        better = least < error
        value, error = torch.where(better, chosen, value), torch.where(better, least, error)
        step = torch.where(better, h[j:ladder].gather(0, at[None])[0], step)
    size = noise.amax(0) / torch.finfo(center.dtype).eps
    if apart == 1:
        error = torch.where(wild > UNRESOLVED * size, torch.inf, error)
    sharp = (plus - 2 * center + minus) / h
    gaps = (2 * sharp[1:] - sharp[:-1]).abs()
    bound = 16 * torch.maximum(noise, e)[1:] / h[1:] + 1e-3 * sharp[1:].abs() + error.nan_to_num(0, 0)
    told = h[1:] <= step  # longer steps see what lies farther away
    if apart == 2:
        told[-2] = False
    told[-1] |= step.isnan()
    lasting = gaps > 0.5 * torch.cat([gaps[:1], gaps[:-1]])  # where f is smooth, it shrinks with h³
    lasting[2:] = lasting[2:] & lasting[1:-1] & lasting[:-2]
    gap = torch.where(told & lasting & (gaps > bound), gaps, 0)[2:].amax(0)
    middle, change = len(h) // 2, (plus - minus).abs()
    jump = (change[-1] > 0.5 * change[middle]) & (change[-1] > 64 * noise[-1])
    kink = (gap > 0) | jump  # (4)
    short = torch.finfo(center.dtype).eps ** (1 / 3)
    k = max(1, min(int((h / h[:1] * 0.25 > short).reshape(len(h), -1).all(1).sum()), ladder - 1))
    coarse, fine = (torch.stack([center - minus[i], plus[i] - center]) / h[i] for i in (k - 1, k))
    sides = torch.where((fine - coarse).abs() <= 0.4 * fine.abs(), 2 * fine - coarse, torch.nan)
    sides = torch.where((fine == 0) & (coarse == 0), 0, sides)
    return Slopes(value, error, sides[0], sides[1], kink, torch.where(jump, gaps[-1], gap), step)


def precision(values: Tensor) -> Tensor:
    """The ε of each function, from its values at many steps, of shape (steps, ...): that of float32 if all fit into it.

    A function that computes in float32 does not move at all where steps are shorter than the ulp of x. Its differences
    are 0 there, without any scatter.
    """
    wide, narrow = torch.finfo(values.dtype).eps, torch.finfo(torch.float32).eps
    coarse = ((values.float() == values) | values.isnan()).all(0) & (values != values[:1]).any(0)
    return torch.where(coarse, narrow, wide).to(values.dtype)


def suffix(x: Tensor, cumulate: object) -> Tensor:
    """The least or largest of x[k:] for each k, and of nothing at the end."""
    flipped = cumulate(x.flip(0), 0)[0].flip(0)  # type: ignore[operator]
    end = torch.inf if cumulate is torch.cummin else -torch.inf
    return torch.cat([flipped, torch.full_like(x[:1], end)])
