"""C++ from expressions: the table of operations, and the text of loops over blocks of elements.

The functions are those of ``native/csrc/math.h``; ``T`` is float or double, ``Fma`` whether the machine fuses multiply
and add.
"""

from __future__ import annotations

import math

from torchcalc.formula.code import Language
from torchcalc.formula.expression import INFIX, UNARY

__all__ = ["CPP"]


def number(x: float) -> str:
    """A literal of type double.

    >>> number(0.1), number(-1.0), number(float("inf"))
    ('0.1', '(-1.0)', '__builtin_inf()')
    """
    if math.isnan(x):
        return '__builtin_nan("")'
    if math.isinf(x):
        return "__builtin_inf()" if x > 0 else "(-__builtin_inf())"
    return repr(x) if math.copysign(1.0, x) > 0 else f"({x!r})"


_COMMON = {
    **{op: f"{{}} {sign} {{}}" for op, sign in INFIX.items()},
    "not": "!{}",
    "neg": "-{}",
    "where": "{} ? {} : {}",
    # NaN where one is NaN, as torch
    "maximum": "({0} > {1}) | ({0} != {0}) ? {0} : {1}",
    "minimum": "({0} < {1}) | ({0} != {0}) ? {0} : {1}",
}

CPP = Language(
    element={
        **{op: f"math::{op}<Fma>({{}})" for op in UNARY},
        **_COMMON,
        "fma": "fma<Fma>({}, {}, {})",
    },
    uniform={
        **{op: f"std::{op}({{}})" for op in UNARY},
        **_COMMON,
        "abs": "std::fabs({})",
        "sigmoid": "1.0 / (1.0 + std::exp(-{}))",
        "rsqrt": "1.0 / std::sqrt({})",
        "sgn": "double(({0} > 0) - ({0} < 0))",
        "fma": "{} * {} + {}",
        "pow": "std::pow({}, {})",
        "rounded": "double(T({}))",  # to the element's type
    },
    literal=lambda x: f"T({number(x)})",
    uniform_literal=number,
)
