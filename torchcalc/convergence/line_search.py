"""How far to go along a direction: steps that are guaranteed to make progress.

Along a direction d a function f is a function of one variable, φ(α) = f(x + αd), with the slope φ'(α) = ∇f(x + αd)ᵀd. Only if
φ'(0) < 0 does it fall at first. How far to go is settled by two conditions. The value must lie below a line that falls
less steeply than the tangent does (Armijo, ``torchcalc/optim/armijo.py``), and the curve must have become flatter, as
otherwise it pays to go on:

    φ(α) ≤ φ(0) + c₁·α·φ'(0),                  0 < c₁ < 1                          (1)
    |φ'(α)| ≤ c₂·|φ'(0)|,                     c₁ < c₂ < 1                         (2)

(1) alone holds for all small enough steps: *backtracking* shrinks α until it does. Differences of values that rounding hides
are taken from the slopes, in (1), (3) and (4).
(1) and (2), the *strong Wolfe* conditions, hold on an interval if φ is smooth and bounded below: l(α), the line in (1),
lies above φ at first and below it in the end, so they cross; between 0 and the first crossing φ − l has a minimum, where
φ'(α) = c₁φ'(0), which is flatter than c₂φ'(0). The search brackets such an interval, doubling α until one of

    (1) fails,      φ(α) is no lower than at the α before,      φ'(α) ≥ 0          (3)

holds (algorithm 3.5), and then shrinks the bracket [α_lo, α_hi], whose end α_lo has the least value of those that satisfy
(1), with φ'(α_lo) pointing into it (algorithm 3.6). The next α is the minimum of the cubic through φ(α_lo), φ'(α_lo) and the
last two other values,

    φ(α_lo + t) ≈ φ(α_lo) + c·t + b·t² + a·t³,     c = φ'(α_lo) < 0,
    c + 2bt + 3at² = 0   where   t = −c/(b + √(b² − 3ac)),                         (4)

or of the parabola (a = 0) where that lies near an end, else the middle. A value or slope that is not finite counts as
+∞: at the edge of f's domain the bracket is halved.

Reference: Nocedal, Wright 2006, "Numerical optimization", algorithms 3.1, 3.5 and 3.6, doi:10.1007/978-0-387-40065-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchcalc.calculus.variables import Tensors, like, named
from torchcalc.optim.armijo import change, enough, hidden

__all__ = ["LineSearch", "line_search"]


@dataclass(frozen=True)
class LineSearch:
    """Where a line search ended.

    Attributes:
        step: α.
        value: f there.
        slope: φ' there; None if it was not needed.
        point: x + α·d, a tensor or dict like x.
        evaluations: of f, at x included.
        gradients: of f, at x included.
        converged: whether the conditions hold. If not, step is the best found that satisfies (1), which may be 0. Where they
            hold by the slopes, because f changes by less than its rounding, value may be that at x.
        reason: why not; else empty.

    >>> found = line_search(lambda x: x**2, torch.tensor(3.0), torch.tensor(-6.0))
    >>> found.value, found.converged, found.evaluations  # at 3 - 6 the loss is the same, at 3 - 3 it is 0
    (0.0, True, 3)
    """

    step: float
    value: float
    slope: float | None
    point: Any
    evaluations: int
    gradients: int
    converged: bool
    reason: str = ""


def line_search(
    f: Callable[[Any], Tensor],
    x: Tensors,
    direction: Tensors,
    *,
    method: Literal["armijo", "strong_wolfe"] = "armijo",
    step: float = 1.0,
    c1: float = 1e-4,
    c2: float = 0.9,
    shrink: float = 0.5,
    max_evaluations: int = 50,
) -> LineSearch:
    """Find a step along a direction that makes f decrease enough.

    Args:
        f: from a tensor, or a dict of tensors, to a real scalar tensor; the same value at every call with the same argument,
            as :func:`torchcalc.calculus.training_loss` returns.
        x: the point; real float tensors. It is not changed.
        direction: d, like x, such as minus the gradient. ``{name: -p.grad for name, p in model.named_parameters()}``
            is one for ``training_loss(...).parameters``.
        method: "armijo": backtracking until (1) holds, which needs one gradient, and more only where rounding hides what f has
            fallen by; "strong_wolfe": (1) and (2), one gradient for most trials.
        step: the first α tried, > 0: 1 is natural for Newton and quasi-Newton directions. Backtracking never exceeds it.
        c1: in (1). 1e-4 asks for hardly more than a decrease.
        c2: in (2); smaller is more exact. 0.9 is usual for Newton and quasi-Newton directions, 0.1 for conjugate gradients.
        shrink: the factor between steps of backtracking, in (0, 1).
        max_evaluations: of f, >= 2; after so many the search gives up.

    Returns:
        :class:`LineSearch`; ``converged`` tells whether the step satisfies the conditions.

    Raises:
        ValueError: f does not fall along the direction, or is not finite at x, or is no scalar; direction is not like x; an
            option out of range.
        TypeError: x is not of a real float dtype, or no tensor or dict of them; direction is complex.

    Reference: Nocedal, Wright 2006, algorithms 3.1, 3.5, 3.6.

    >>> x = torch.tensor([3.0, 1.0])
    >>> found = line_search(lambda x: (x**2).sum(), x, -2 * x)  # the whole step lands at −x, on the same height
    >>> found.step, found.point
    (0.5, tensor([0., 0.]))
    """
    if method not in ("armijo", "strong_wolfe"):
        raise ValueError(f'method: {method!r}; it must be "armijo" or "strong_wolfe"')
    if not 0 < step < math.inf:
        raise ValueError(f"step: {step}; it must be positive and finite")
    if not 0 < c1 < 1:
        raise ValueError(f"c1: {c1}; it must be in (0, 1)")
    if method == "strong_wolfe" and not c1 < c2 < 1:
        raise ValueError(f"c1, c2: {c1}, {c2}; they must satisfy 0 < c1 < c2 < 1")
    if not 0 < shrink < 1:
        raise ValueError(f"shrink: {shrink}; it must be in (0, 1)")
    if max_evaluations < 2:
        raise ValueError(f"max_evaluations: {max_evaluations}; it must be at least 2, one of them at x")
    line = _Line(f, x, direction, c1, c2, max_evaluations)
    start = line.at(0.0)
    if not math.isfinite(start.value):
        raise ValueError(f"f: it is {start.value} at x; start where it is finite")
    if not start.slope < 0:
        raise ValueError(
            f"direction: the slope of f along it is {start.slope:.3g} at x, and must be negative; minus the gradient is "
            "a direction of descent, except where the gradient is zero or not finite"
        )
    line.start = start
    try:
        end = _backtrack(line, step, shrink) if method == "armijo" else _bracket(line, step)
        reason = ""
    except _GaveUp as error:
        end, reason = (start if error.best.is_at(start) else error.best), str(error)
        if end is start and line.last is not None and hidden(start.value, line.last.value, start.eps):
            reason = f"no progress is measurable: f changes by less than its rounding, {start.eps:.1g} of it; {reason}"
    slope = end.slope if end.known else None
    return LineSearch(end.step, end.value, slope, end.point, line.evaluations, line.gradients, not reason, reason)


def _backtrack(line: _Line, step: float, shrink: float) -> _Trial:
    """Algorithm 3.1."""
    assert line.start is not None
    while True:
        trial = line.at(step)
        if trial.is_at(line.start):  # (1) would compare f(x) with itself
            raise _GaveUp(line.start, f"a step of {step:.3g} is too small to change x in its dtype")
        if line.low_enough(trial):  # (1)
            return trial
        step *= shrink


def _bracket(line: _Line, step: float) -> _Trial:
    """Algorithm 3.5."""
    assert line.start is not None
    before = line.start
    while True:
        trial = line.at(step)
        if not line.low_enough(trial) or trial.above(before) >= 0 or math.isnan(trial.slope):  # (3)
            return _zoom(line, before, trial)
        line.best = trial
        if line.flat_enough(trial):
            return trial
        if trial.slope >= 0:  # (3)
            return _zoom(line, trial, before)
        before, step = trial, 2 * step


def _zoom(line: _Line, low: _Trial, high: _Trial) -> _Trial:
    """Algorithm 3.6."""
    other: _Trial | None = None
    while True:
        line.best = low
        trial = line.at(_between(low, high, other))
        if not line.low_enough(trial) or trial.above(low) >= 0 or math.isnan(trial.slope):
            if trial.is_at(low):
                raise _shrunk(low)
            other, high = high, trial
            continue
        if line.flat_enough(trial):
            return trial
        if trial.slope * (high.step - low.step) >= 0:
            other, high = high, low
        else:
            other = low
        low = trial


def _between(low: _Trial, high: _Trial, other: _Trial | None) -> float:
    """A step between two, by (4), away from the ends; the middle where the curve has no such minimum there."""
    h = high.step - low.step
    middle = low.step + 0.5 * h
    if middle in (low.step, high.step):
        raise _shrunk(low)
    c = low.slope * h  # from here on in units of h
    u = high.above(low) - c  # b + a
    guesses = [(0.0, u, 0.1)]
    if other is not None:
        k = (other.step - low.step) / h
        if 0 < k * k < math.inf and k != 1:
            a = (u - (other.above(low) - c * k) / (k * k)) / (1 - k)
            guesses.insert(0, (a, u - a, 0.2))
    for a, b, margin in guesses:
        t = _minimum(c, b, a)
        if margin <= t <= 1 - margin:  # never true of nan
            return low.step + t * h
    return middle


def _minimum(c: float, b: float, a: float) -> float:
    """Of c·t + b·t² + a·t³; nan if there is none."""
    square = b * b - 3 * a * c
    divisor = b + math.sqrt(square) if 0 <= square < math.inf else math.nan
    return -c / divisor if divisor else math.nan  # (4)


class _GaveUp(Exception):
    def __init__(self, best: _Trial, reason: str) -> None:
        super().__init__(reason)
        self.best = best


def _shrunk(low: _Trial) -> _GaveUp:
    return _GaveUp(low, f"the bracket has shrunk to a point, {low.step:.6g}: a kink of f, or its rounding, is there")


class _Line:
    """φ, and how often it was evaluated."""

    def __init__(
        self, f: Callable[[Any], Tensor], x: Tensors, direction: Tensors, c1: float, c2: float, max_evaluations: int
    ) -> None:
        self.f, self.c1, self.c2, self.max_evaluations = f, c1, c2, max_evaluations
        self.bare = isinstance(x, Tensor)
        self.x = named(x, "x")
        self.d = named(like(direction, self.x[""] if self.bare else self.x, "direction"), "direction")
        self.evaluations = self.gradients = 0
        self.start: _Trial | None = None
        self.best: _Trial | None = None
        self.last: _Trial | None = None

    def at(self, step: float) -> _Trial:
        """Evaluate."""
        if self.evaluations >= self.max_evaluations:
            assert self.start is not None
            best = self.best or self.start
            raise _GaveUp(
                best, f"no step satisfied the conditions in {self.evaluations} evaluations, down to {step:.3g}"
            )
        self.evaluations += 1
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {k: t + step * self.d[k] if step else t.clone() for k, t in self.x.items()}
            for leaf in leaves.values():
                leaf.requires_grad_()
            y = self.f(leaves[""] if self.bare else leaves)
        if not isinstance(y, Tensor) or y.numel() != 1 or y.is_complex():
            what = f"shape {tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"f returned {what}; it must return a real scalar tensor")
        self.last = _Trial(self, step, y, leaves)
        return self.last

    def low_enough(self, trial: _Trial) -> bool:
        assert self.start is not None
        return enough(trial.above(self.start), -trial.step * self.start.slope, self.c1)  # (1)

    def flat_enough(self, trial: _Trial) -> bool:
        assert self.start is not None
        return abs(trial.slope) <= -self.c2 * self.start.slope  # (2)


class _Trial:
    """A point on the line."""

    def __init__(self, line: _Line, step: float, y: Tensor, leaves: dict[str, Tensor]) -> None:
        self.step, self.value, self.eps = step, y.item(), torch.finfo(y.dtype).eps if y.is_floating_point() else 0.0
        if step and not math.isfinite(self.value):
            self.value = math.inf
        self._line, self._leaves = line, leaves
        self._y: Tensor | None = y
        self._slope = math.nan
        self.known = False

    @property
    def slope(self) -> float:
        """φ', at the first use from a backward pass."""
        if self._y is not None:
            self._slope = 0.0  # if f does not depend on x
            if self._y.requires_grad:
                self._line.gradients += 1
                found = torch.autograd.grad(self._y, list(self._leaves.values()), allow_unused=True)
                for name, g in zip(self._leaves, found, strict=True):
                    if g is not None:
                        self._slope += float((g.to_dense().double() * self._line.d[name].double()).sum())
            if not math.isfinite(self._slope):
                self._slope = math.nan
            self._y, self.known = None, True
        return self._slope

    def above(self, other: _Trial) -> float:
        """φ here less φ there."""
        by_slopes = lambda: (self.step - other.step) * (self.slope + other.slope) / 2  # noqa: E731
        return change(other.value, self.value, self.eps, by_slopes)

    def is_at(self, other: _Trial) -> bool:
        return all(torch.equal(t, u) for t, u in zip(self._leaves.values(), other._leaves.values(), strict=True))

    @property
    def point(self) -> Any:
        leaves = {k: t.detach() for k, t in self._leaves.items()}
        return leaves[""] if self._line.bare else leaves
