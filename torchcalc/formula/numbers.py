"""Numbers that are the same for all elements, computed on the host in double precision, as Python computes them in a rule."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence

from torchcalc.formula.code import Code, Language, assignments
from torchcalc.formula.expression import INFIX, UNARY, Expression

__all__ = ["host_function"]


def _quotient(a: float, b: float) -> float:
    if b != 0 or math.isnan(a):
        return a / b
    return math.nan if a == 0 else math.copysign(math.inf, a) * math.copysign(1.0, b)


def _power(a: float, b: float) -> float:
    try:
        return math.pow(a, b)
    except OverflowError:
        return math.inf
    except ValueError:  # 0 to a negative power, or a root of a negative number
        return math.inf if a == 0 else math.nan


def _single(x: float) -> float:
    try:
        result: float = struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)
    return result


def _extended(function: Callable[[float], float]) -> Callable[[float], float]:
    """A function of math that gives inf or nan where that raises."""

    def call(x: float) -> float:
        try:
            return function(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return math.nan if x != 0 else -math.inf  # log(0)

    return call


_NAMES = {
    **{op: _extended(getattr(math, op)) for op in UNARY if hasattr(math, op)},
    "abs": abs,
    "neg": lambda x: -x,
    "rsqrt": lambda x: _quotient(1.0, _extended(math.sqrt)(x)),
    "sgn": lambda x: float((x > 0) - (x < 0)),
    "sigmoid": lambda x: 1 / (1 + _extended(math.exp)(-x)),
    "maximum": lambda a, b: a if a > b or a != a else b,
    "minimum": lambda a, b: a if a < b or a != a else b,
    "quotient": _quotient,
    "power": _power,
    "single": _single,
    "inf": math.inf,
    "nan": math.nan,
}

_OPERATIONS = {
    **{op: f"{op}({{}})" for op in UNARY},
    **{op: f"{{}} {sign} {{}}" for op, sign in INFIX.items()},
    "div": "quotient({}, {})",
    "pow": "power({}, {})",
    "fma": "{} * {} + {}",
    "not": "not {}",
    "where": "{1} if {0} else {2}",
    "maximum": "maximum({}, {})",
    "minimum": "minimum({}, {})",
}


def host_function(
    outputs: Mapping[str, Expression], parameters: Sequence[str], wanted: Sequence[str], type_: str
) -> Callable[..., tuple[float, ...]]:
    """A function of the parameters, in order, that returns the uniform numbers named ``wanted`` of the outputs' code.

    >>> x, a = Expression.input("x"), Expression.parameter("a")
    >>> host_function({"y": x * (1 - a * a)}, ("a",), ("u1",), "fp32")(0.5)
    (0.75,)
    """
    uniform = {**_OPERATIONS, "rounded": "single({})" if type_ == "fp32" else "{}"}
    anything = dict.fromkeys((*uniform, "rounded"), "")
    language = Language(element=anything, uniform=uniform, literal=repr, uniform_literal=lambda x: f"({x!r})")
    code: Code = assignments(outputs, language, lambda e: str(e.args[0]))
    lines = "".join(f"    {a.name} = {a.text}\n" for a in code.uniform)
    text = (
        f"def numbers({', '.join(parameters)}):\n{lines}    return ({''.join(f'float({name}), ' for name in wanted)})\n"
    )
    names = dict(_NAMES)
    exec(text, names)
    function: Callable[..., tuple[float, ...]] = names["numbers"]  # type: ignore[assignment]
    return function
