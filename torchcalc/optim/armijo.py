"""Armijo's test: has a step lowered a function by enough?

Along a direction d a function f is a function of one variable, φ(α) = f(x + αd), with the slope φ'(α) = ∇f(x + αd)ᵀd, and

    φ(α) = φ(0) + α·φ'(0) + o(α),

so where φ'(0) < 0 a small enough step lowers it by about α·|φ'(0)|. The test asks for a fraction c of that:

    φ(α) − φ(0) ≤ c·α·φ'(0),                    0 < c < 1.                          (1)

It holds for all small enough α: *backtracking* shrinks α until it does. For minus the gradient, d = −∇f, φ'(0) = −‖∇f‖².

Rounding.  φ is known to a rounding error e ≈ ε·|φ|, and a difference below 2e is not known at all: 10⁴ + 10⁻⁴ is 10⁴ in
float32. The slopes still know it then, by the trapezoidal rule,

    φ(b) − φ(a) = (b − a)·(φ'(a) + φ'(b))/2 + O((b − a)³),                          (2)

which is taken where the values differ by less than 2e, and believed if it says no more than twice that.

References: Armijo 1966, doi:10.2140/pjm.1966.16.1; Nocedal, Wright 2006, "Numerical optimization", section 3.1; Hager, Zhang
2005, doi:10.1137/030601880 (the slopes instead of the values).
"""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["change", "enough", "hidden"]


def enough(change: float, promise: float, c: float) -> bool:
    """(1), of the change φ(α) − φ(0) and the promise −α·φ'(0); never where φ is not finite.

    >>> enough(-0.5, promise=1.0, c=0.1), enough(-0.05, promise=1.0, c=0.1)
    (True, False)
    """
    return math.isfinite(change) and change <= -c * promise


def change(before: float, after: float, eps: float, by_slopes: Callable[[], float]) -> float:
    """after − before; where rounding hides that, by (2).

    Args:
        before, after: values of φ.
        eps: the unit of rounding of their dtype.
        by_slopes: the right-hand side of (2), evaluated if it is needed.

    >>> change(1e4, 1e4, 2.0**-23, lambda: -1e-4), change(2.0, 1.0, 2.0**-23, lambda: -7.0)
    (-0.0001, -1.0)
    """
    if not hidden(before, after, eps):
        return after - before
    slopes = by_slopes()
    return slopes if abs(slopes) <= 4 * eps * max(abs(before), abs(after)) else after - before


def hidden(before: float, after: float, eps: float) -> bool:
    """Whether rounding hides the difference of two values.

    >>> hidden(1e4, 1e4 + 1e-3, 2.0**-23), hidden(1.0, 1.1, 2.0**-23)
    (True, False)
    """
    return math.isfinite(after) and abs(after - before) <= 2 * eps * max(abs(before), abs(after))
