"""Update rules of optimizers, recorded as expressions: what a kernel of any language computes in one pass.

A rule is written in Tensor's own methods, in place (``m.lerp_(g, 1 - b1)``, ``p.addcdiv_(m, v.sqrt())``). :func:`record` runs
it, unchanged, on a :class:`Cell` for each tensor: an in-place method makes a new expression, which the cell then holds. What the
cells of p and the slots hold at the end are the outputs.

A rule may branch on what is fixed for a whole step: on flags (``if decoupled``), on a slot that is there or not (``if
v_max is not None``), and on whether a number is zero (``if weight_decay != 0``). Each way is a recording of its own. A rule
that branches on anything else, such as ``if t < 10``, cannot be recorded and raises: it would record one branch only. Its
optimizer then runs the rule itself.

>>> def rule(p, g, *, lr, weight_decay):
...     if weight_decay != 0:
...         g = g.add(p, alpha=weight_decay)
...     p.add_(g, alpha=-lr)
>>> recording = record(rule, (), {"lr": 0.1, "weight_decay": 0})
>>> recording.parameters, recording.outputs
(('lr', 'weight_decay'), {'p': fma(g, neg(lr), p)})
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from torchcalc.formula import expression
from torchcalc.formula.expression import Expression, walk

__all__ = ["Cell", "Recording", "is_number", "record"]


@dataclass(frozen=True)
class Recording:
    """One way through a rule.

    Attributes:
        name: the rule's, for people.
        slots: names of the state that has the parameter's shape.
        parameters: names of the numbers that are the same for all elements of a tensor, such as lr and t, in the order of
            the arguments; also of those that this way does not use. The numbers of an optimizer are made of them in
            double precision (``1 - b1 ** t``) and rounded to the type that elements are computed in; ``rounded(x)``
            among them stands for a number that is rounded so before it is computed with.
        outputs: the new "p", and every slot's new value, in terms of the inputs "p", "g" and the slots.
    """

    name: str
    slots: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: Mapping[str, Expression]

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("p", "g", *self.slots)

    @cached_property
    def hash(self) -> str:
        """Of all that a kernel computes: a kernel with this hash was made from the same recording."""
        places: dict[Expression, int] = {}
        lines = [" ".join(self.inputs), " ".join(self.parameters)]
        for e in walk(self.outputs.values()):
            places[e] = len(places)
            lines.append(
                f"{e.op} " + " ".join(str(places[a]) if isinstance(a, Expression) else repr(a) for a in e.args)
            )
        lines += [f"{name} {places[e]}" for name, e in self.outputs.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    @property
    def number(self) -> int:
        """The hash as a signed integer of 64 bits."""
        return int.from_bytes(bytes.fromhex(self.hash), signed=True)


def is_number(x: Any) -> bool:
    """Whether an argument of a rule is a parameter of its kernel; flags and None are not."""
    return isinstance(x, (float, int, Tensor)) and not isinstance(x, bool)


def record(rule: Callable[..., None], slots: Sequence[str], arguments: Mapping[str, Any]) -> Recording:
    """Record the way that the rule goes with these arguments.

    Args:
        rule: ``rule(p, g, **slots, **arguments)``.
        slots: names of the slots that there are.
        arguments: all others. Of a number, or 1-element tensor, the recording only knows whether it is zero, and only if the
            rule asks; everything else (flags, None) is fixed.

    Raises:
        TypeError, AttributeError: the rule asks for more, or uses what cannot be recorded.
    """
    numbers = {name: x for name, x in arguments.items() if is_number(x)}
    symbols = {Expression.parameter(name): x for name, x in numbers.items()}

    def decide(condition: Expression) -> bool | None:
        """Whether a number is zero, or not; None for all other questions."""
        if condition.op not in ("eq", "ne"):
            return None
        a, b = condition.args
        number, other = (a, b) if a in symbols else (b, a)
        if number not in symbols or other.value != 0:
            return None
        return bool((symbols[number] == 0) == (condition.op == "eq"))

    cells = {name: Cell(Expression.input(name)) for name in ("p", "g", *slots)}
    with expression.deciding(decide):
        rule(**cells, **{**arguments, **{name: Expression.parameter(name) for name in numbers}})
    if cells["g"].value is not Expression.input("g"):
        raise TypeError(
            f"the rule {_name(rule)} writes to g, which belongs to the caller; use methods such as g.mul, not g.mul_"
        )
    outputs = {name: cells[name].value for name in ("p", *slots)}
    return Recording(_name(rule), tuple(slots), tuple(numbers), outputs)


def _name(rule: Callable[..., None]) -> str:
    return getattr(rule, "__name__", type(rule).__name__)


class Cell:
    """What a rule under recording takes for a tensor: it holds an expression, and in-place methods make it hold another.

    >>> v = Cell(Expression.input("v"))
    >>> s = v.sqrt().add_(1e-8)
    >>> v.value, s.value
    (v, (sqrt(v) + 1e-08))
    """

    __slots__ = ("value",)

    def __init__(self, value: Expression) -> None:
        self.value = value

    def is_complex(self) -> bool:
        return False  # a complex tensor is a real one of one more dimension, to all rules

    def clone(self) -> Cell:
        return Cell(self.value)

    def copy_(self, other: Cell) -> Cell:
        self.value = _plain(other)
        return self

    def masked_fill(self, mask: Cell, value: float) -> Cell:
        return Cell(expression.where(mask.value, value, self.value))

    def __getattr__(self, name: str) -> Callable[..., Cell]:
        function = getattr(self.value, _OPERATORS.get(name, name.removesuffix("_")))

        def method(*args: Any, **kwargs: Any) -> Cell:
            new = function(*map(_plain, args), **{k: _plain(x) for k, x in kwargs.items()})
            if not name.endswith("_"):
                return Cell(new)
            self.value = new
            return self

        return method

    def __neg__(self) -> Cell:
        return Cell(-self.value)

    def __add__(self, other: Any) -> Cell:
        return Cell(self.value + _plain(other))

    def __sub__(self, other: Any) -> Cell:
        return Cell(self.value - _plain(other))

    def __mul__(self, other: Any) -> Cell:
        return Cell(self.value * _plain(other))

    def __truediv__(self, other: Any) -> Cell:
        return Cell(self.value / _plain(other))

    def __rsub__(self, other: Any) -> Cell:
        return Cell(other - self.value)

    def __rtruediv__(self, other: Any) -> Cell:
        return Cell(other / self.value)

    __radd__, __rmul__ = __add__, __mul__


_OPERATORS = {name: f"__{name}__" for name in ("lt", "le", "gt", "ge", "eq", "ne")}


def _plain(x: Any) -> Any:
    return x.value if isinstance(x, Cell) else x
