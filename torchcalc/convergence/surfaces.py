"""Functions of two variables on which methods of descent are compared: what each of them is hard for.

    bowl        f = (x² + 20·y²)/2                              one curvature is 20 times the other
    rosenbrock  f = (1 − x)² + 100·(y − x²)²                    a narrow, bent valley
    beale       f = (1.5 − x + xy)² + (2.25 − x + xy²)² + (2.625 − x + xy³)²       flat, with steep walls
    himmelblau  f = (x² + y − 11)² + (x + y² − 7)²              four minima

All have the minimum 0. References: Rosenbrock 1960, doi:10.1093/comjnl/3.3.175; Beale 1958, "On an iterative method for
finding a local minimum of a function of more than one variable"; Himmelblau 1972, "Applied nonlinear programming".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["SURFACES", "Surface"]


@dataclass(frozen=True)
class Surface:
    """A function of points (..., 2), vectorised over the leading dimensions.

    Attributes:
        name: one word.
        function: (..., 2) -> (...).
        start: where a comparison starts from.
        minima: all global minima, where the function is 0.
        bounds: (x0, x1, y0, y1) of a plot that holds the start and the minima.

    >>> import torch
    >>> SURFACES["rosenbrock"](torch.tensor([1.0, 1.0]))
    tensor(0.)
    """

    name: str
    function: Callable[[Tensor], Tensor]
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    bounds: tuple[float, float, float, float]

    def __call__(self, p: Tensor) -> Tensor:
        """The function at points (..., 2)."""
        if p.shape[-1:] != (2,):
            raise ValueError(f"p: shape {tuple(p.shape)}; the last dimension must be 2")
        return self.function(p)


def _bowl(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return (x**2 + 20 * y**2) / 2


def _rosenbrock(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def _beale(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _himmelblau(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


SURFACES: dict[str, Surface] = {
    s.name: s
    for s in (
        Surface("bowl", _bowl, (-4.0, 1.5), ((0.0, 0.0),), (-5.0, 5.0, -2.5, 2.5)),
        Surface("rosenbrock", _rosenbrock, (-1.2, 1.0), ((1.0, 1.0),), (-2.0, 2.0, -1.0, 3.0)),
        Surface("beale", _beale, (1.0, 1.5), ((3.0, 0.5),), (-0.5, 4.5, -1.5, 2.0)),
        Surface(
            "himmelblau",
            _himmelblau,
            (0.0, 0.0),
            ((3.0, 2.0), (-2.8051180869527449, 3.1313125182505730), (-3.7793102533777469, -3.2831859912861694),
             (3.5844283403304917, -1.8481265269644036)),
            (-5.0, 5.0, -5.0, 5.0),
        ),
    )
}  # fmt: skip
