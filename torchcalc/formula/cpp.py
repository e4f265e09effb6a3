"""C++ from expressions: the table of operations, and the text of what a loop does with one element.

The functions are those of ``native/csrc/math.h``; ``T`` is float or double, ``Fma`` whether the machine fuses multiply
and add.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torchcalc.formula.code import Language, assignments
from torchcalc.formula.expression import INFIX, UNARY, Expression, walk

__all__ = ["CPP", "is_heavy", "kernel"]


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
        "pow": "math::pow<Fma>({}, {})",
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


def kernel(name: str, arguments: Sequence[str], parameters: Sequence[str], outputs: Sequence[Expression]) -> str:
    """The struct of one kernel: what it makes of one element of each array. ``native/csrc/pointwise.h`` has the loops.

    Args:
        name: of the struct.
        arguments: names of the arrays, in the order in which they are given at run time.
        parameters: names of the numbers, likewise.
        outputs: expressions of these; what they share is computed once.
    """

    def called(e: Expression) -> str:
        return f"x_{e.args[0]}" if e.op == "input" else f"p_{e.args[0]}"

    code = assignments({f"y[{k}]": e for k, e in enumerate(outputs)}, CPP, called)
    inputs, numbers = (
        set[str]().union(*(e.inputs() for e in outputs)),
        set[str]().union(*(e.parameters() for e in outputs)),
    )
    read = [(i, argument) for i, argument in enumerate(arguments) if argument in inputs]
    used = {a.name for a in code.uniform if any(_uses(a.name, b.text) for b in code.element)} | set(
        code.results.values()
    )

    def type_of(e: Expression) -> str:
        return "bool" if e.is_condition else "T"

    uniform = [
        *(f"const double p_{p} = parameters[{i}];" for i, p in enumerate(parameters) if p in numbers),
        *(
            f"const {'bool' if a.expression.is_condition else 'double'} {a.name}_ = {_uniform(a.text)};"
            for a in code.uniform
        ),
        *(
            f"const {type_of(a.expression)} {a.name} = "
            f"{a.name + '_' if a.expression.is_condition else f'number<T>({a.name}_)'};"
            for a in code.uniform
            if a.name in used
        ),
    ]
    element = [
        *(f"const {type_of(a.expression)} {a.name} = {a.text};" for a in code.element),
        *(f"{y} = {result};" for y, result in code.results.items()),
    ]
    return (
        "".join(f"// {e}\n" for e in outputs) + f"struct {name} {{\n"
        f"  static constexpr int outputs = {len(outputs)}, arguments[] = {{{', '.join(str(i) for i, _ in read) or '-1'}}};\n"
        f"  using Inputs = std::make_index_sequence<{len(read)}>;\n"
        f"  static constexpr bool heavy = {'true' if any(map(is_heavy, outputs)) else 'false'};\n"
        "  template <class T, bool Fma>\n"
        "  static TC_INLINE auto element(const double* parameters) {\n"
        "    (void)parameters;\n"
        + "".join(f"    {line}\n" for line in uniform)
        + f"    return [=]({''.join(f'T x_{argument}, ' for _, argument in read)}T* y) TC_INLINE_LAMBDA {{\n"
        + "".join(f"      {line}\n" for line in element)
        + "    };\n  }\n};\n"
    )


def _uses(name: str, text: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def _uniform(text: str) -> str:
    """Uniform numbers are made of each other in double precision, where their names end in an underscore."""
    return re.sub(r"\b(u\d+)\b", r"\1_", text)


_HEAVY = {"erf", "erfc", "exp", "expm1", "log", "log1p", "pow", "sigmoid", "tanh", "sin", "cos"}


def is_heavy(expression: Expression) -> bool:
    """Whether an element costs more than moving it."""
    return any(e.op in _HEAVY for e in walk([expression]) if not e.is_uniform)
