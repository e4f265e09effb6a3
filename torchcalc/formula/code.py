"""Expressions as a list of assignments, in any language that has a table of its operations.

What is the same for all elements (``1 - b1 ** t``) comes first, apart: it is computed once, in double precision, as Python
computes it where a formula runs on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torchcalc.formula.expression import Expression, walk

__all__ = ["Code", "Language", "assignments"]


@dataclass(frozen=True)
class Language:
    """How each operation is written, for numbers that differ by element and for those that do not.

    Attributes:
        element: operation → format of its arguments, e.g. ``"add": "{} + {}"``.
        uniform: the same, in double precision.
        literal: writes a constant of an element's type.
        uniform_literal: writes a constant of double precision.
    """

    element: Mapping[str, str]
    uniform: Mapping[str, str]
    literal: Callable[[float], str]
    uniform_literal: Callable[[float], str]


class Assignment(NamedTuple):
    name: str
    expression: Expression
    text: str


@dataclass(frozen=True)
class Code:
    """Attributes:
    uniform: assignments that are the same for all elements, in order.
    element: assignments for one element, in order; they may use the uniform ones.
    results: the name or literal of each output.
    """

    uniform: Sequence[Assignment]
    element: Sequence[Assignment]
    results: Mapping[str, str]


def assignments(outputs: Mapping[str, Expression], language: Language, name: Callable[[Expression], str]) -> Code:
    """Write the outputs down; ``name`` gives an input's or parameter's name.

    A uniform number enters the element's assignments by its name: the language's user declares it there, rounded.
    """
    uniform: list[Assignment] = []
    element: list[Assignment] = []
    # A parameter that elements use is a uniform assignment too, so that it is rounded to the element's type once.
    as_uniform: dict[Expression, str] = {}
    as_element: dict[Expression, str] = {}

    def of_uniform(e: Expression) -> str:
        if e.op == "constant":
            return language.uniform_literal(e.args[0])
        if e.op == "parameter":
            return name(e)
        if e not in as_uniform:
            text = language.uniform[e.op].format(*map(of_uniform, e.children))
            as_uniform[e] = f"u{len(as_uniform)}"
            uniform.append(Assignment(as_uniform[e], e, text))
        return as_uniform[e]

    def use_of_uniform(e: Expression) -> str:
        if e.op == "parameter" and e not in as_uniform:
            as_uniform[e] = f"u{len(as_uniform)}"
            uniform.append(Assignment(as_uniform[e], e, name(e)))
        return of_uniform(e) if e.op != "parameter" else as_uniform[e]

    for e in walk(outputs.values()):  # arguments first: no recursion deeper than a uniform part
        if e.is_uniform or e.op == "input":
            continue
        arguments = [of_element(a, as_element, use_of_uniform, language, name) for a in e.children]
        as_element[e] = f"t{len(as_element)}"
        element.append(Assignment(as_element[e], e, language.element[e.op].format(*arguments)))
    results = {k: of_element(e, as_element, use_of_uniform, language, name) for k, e in outputs.items()}
    return Code(uniform, element, results)


def of_element(
    e: Expression,
    known: Mapping[Expression, str],
    use_of_uniform: Callable[[Expression], str],
    language: Language,
    name: Callable[[Expression], str],
) -> str:
    if e.op == "constant":
        return language.literal(e.args[0])
    if e.op == "input":
        return name(e)
    return use_of_uniform(e) if e.is_uniform else known[e]
