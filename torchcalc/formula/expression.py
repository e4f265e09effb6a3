"""The algebra of formulas, and what a formula looks like once it is recorded.

A formula is a few lines of Python in Tensor's own methods (``x * x.sigmoid()``) and the functions of this file, which serve
where Tensor has an operator's name only for tensors: :func:`where`, :func:`maximum`, :func:`minimum`. Called with tensors
it computes. Called with :class:`Expression` it is recorded: every method makes a node, and the node that comes back is the
root of a graph, from which other files make C++ (:mod:`torchcalc.formula.cpp`) and Triton (:mod:`torchcalc.formula.triton`),
and of which a test proves that each slope is the derivative of the value.

Nodes are interned: what is the same expression is the same object, so a common subexpression is computed once.

>>> x = Expression.input("x")
>>> x * x.sigmoid() is x * x.sigmoid()
True
>>> print(where(x > 0, x, 0.01 * x))
where((x > 0.0), x, (0.01 * x))
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = ["Expression", "Number", "Term", "maximum", "minimum", "times", "where"]

Number = float  # int too, as ever in Python
Term = Any  # Tensor | Expression | Number: what formulas are made of

#: Functions of one real argument, under Tensor's names.
UNARY = (
    "abs", "cos", "erf", "erfc", "exp", "expm1", "floor", "log", "log1p", "neg", "rsqrt", "sgn", "sigmoid", "sin", "sqrt",
    "tanh",
)  # fmt: skip
#: Operators that print between their arguments.
INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
    "and": "&", "or": "|",
}  # fmt: skip
CONDITIONS = ("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not")
COMMUTATIVE = ("add", "mul", "and", "or", "eq", "ne")


class Expression:
    """A node: an operation and its arguments. Leaves are inputs (tensors), parameters (numbers known at run time), constants.

    Attributes:
        op: ``"input"``, ``"parameter"``, ``"constant"``, or the operation's name.
        args: expressions; of an input or parameter its name, of a constant its value.

    In an ``if`` it raises: a formula that branches on values would record one branch only. Use :func:`where`.
    """

    __slots__ = ("__weakref__", "args", "op")
    op: str
    args: tuple[Any, ...]

    def __new__(cls, op: str, *args: Any) -> Expression:
        key = (op, *(id(a) if isinstance(a, Expression) else (type(a), _exact(a)) for a in args))
        found = _interned.get(key)
        if found is None:
            found = super().__new__(cls)
            found.op, found.args = op, args
            _interned[key] = found
        return found

    @staticmethod
    def input(name: str) -> Expression:
        """A tensor, of which the formula sees one element."""
        return Expression("input", name)

    @staticmethod
    def parameter(name: str) -> Expression:
        """A number that is the same for all elements and known when the formula runs."""
        return Expression("parameter", name)

    @staticmethod
    def of(x: Term) -> Expression:
        """A number as a constant; an expression as it is."""
        if isinstance(x, Expression):
            return x
        if isinstance(x, (int, float)):
            return Expression("constant", float(x))
        raise TypeError(
            f"a formula combined an expression with {type(x).__name__} {x!r}; use numbers, Tensor's own methods, and "
            "where, maximum, minimum of torchcalc.formula"
        )

    @property
    def value(self) -> float | None:
        """The number, if this is a constant."""
        return self.args[0] if self.op == "constant" else None

    @property
    def is_condition(self) -> bool:
        """Whether it is true or false, and not a number."""
        return self.op in CONDITIONS

    @property
    def is_uniform(self) -> bool:
        """Whether it is the same for all elements: made of parameters and constants alone."""
        return not self.inputs()

    @property
    def children(self) -> tuple[Expression, ...]:
        """The arguments that are expressions."""
        return tuple(a for a in self.args if isinstance(a, Expression))

    def inputs(self) -> set[str]:
        """Names of the inputs that it is made of."""
        return {e.args[0] for e in walk([self]) if e.op == "input"}

    def parameters(self) -> set[str]:
        """Names of the parameters that it is made of."""
        return {e.args[0] for e in walk([self]) if e.op == "parameter"}

    def __str__(self) -> str:
        if self.op in ("input", "parameter"):
            return str(self.args[0])
        if self.op == "constant":
            return repr(self.args[0])
        if self.op in INFIX:
            return f"({self.args[0]} {INFIX[self.op]} {self.args[1]})"
        return f"{self.op}({', '.join(map(str, self.args))})"

    __repr__ = __str__

    def __bool__(self) -> bool:
        answer = _decide.get()(self)
        if answer is not None:
            return answer
        raise TypeError(f"a formula asked whether {self} is true, which differs by element; use where(condition, a, b)")

    # Arithmetic, under Tensor's names. A named method's meaning, where it is finer than arithmetic's, is that of torch's
    # vectorised loops: addcmul and lerp are fused multiply-adds there.

    def add(self, other: Term, alpha: Term = 1) -> Expression:
        return binary("add", self, other) if _is_one(alpha) else fma(Expression.of(other), alpha, self)

    def sub(self, other: Term, alpha: Term = 1) -> Expression:
        return binary("sub", self, other) if _is_one(alpha) else fma(Expression.of(other), -alpha, self)

    def mul(self, other: Term) -> Expression:
        return binary("mul", self, other)

    def div(self, other: Term) -> Expression:
        return binary("div", self, other)

    def addcmul(self, a: Term, b: Term, value: Term = 1) -> Expression:
        """self + value·a·b, rounded as torch rounds it: (value·a)·b + self."""
        a = Expression.of(a)
        return fma(a if _is_one(value) else a.mul(value), b, self)

    def addcdiv(self, a: Term, b: Term, value: Term = 1) -> Expression:
        """self + value·a/b: self + (value·a)/b."""
        a = Expression.of(a)
        return self.add((a if _is_one(value) else a.mul(value)).div(b))

    def lerp(self, end: Term, weight: Term) -> Expression:
        """self + weight·(end − self), from the nearer end, as torch.

        A weight that is a parameter is rounded before it is compared with 0.5 and 1 is subtracted, as there.
        """
        difference = Expression.of(end).sub(self)
        if isinstance(weight, Expression) and weight.is_uniform:
            weight = Expression("rounded", weight)
        near = abs(weight) < 0.5
        return fma(where(near, weight, weight - 1), difference, where(near, self, end))

    def pow(self, exponent: Term) -> Expression:
        if isinstance(exponent, (int, float)):
            simple: dict[float, Callable[[], Expression]] = {
                0.5: self.sqrt, 1: lambda: self, 2: lambda: self * self, 3: lambda: self * self * self,
                -1: lambda: 1 / self, -0.5: self.rsqrt,
            }  # fmt: skip
            if exponent in simple and not self.is_uniform:
                return simple[exponent]()
        return binary("pow", self, exponent)

    def square(self) -> Expression:
        return self * self

    def reciprocal(self) -> Expression:
        return 1 / self

    def maximum(self, other: Term) -> Expression:
        return binary("maximum", self, other)

    def minimum(self, other: Term) -> Expression:
        return binary("minimum", self, other)

    def clamp(self, min: Term | None = None, max: Term | None = None) -> Expression:
        low = self if min is None else self.maximum(min)
        return low if max is None else low.minimum(max)

    def clamp_min(self, min: Term) -> Expression:
        return self.maximum(min)

    def clamp_max(self, max: Term) -> Expression:
        return self.minimum(max)

    def where(self, condition: Term, other: Term) -> Expression:
        return _where(condition, self, other)

    def isnan(self) -> Expression:
        return self != self

    def conj(self) -> Expression:
        return self  # formulas are recorded for real numbers

    def abs(self) -> Expression:
        return unary("abs", self)

    def cos(self) -> Expression:
        return unary("cos", self)

    def erf(self) -> Expression:
        return unary("erf", self)

    def erfc(self) -> Expression:
        return unary("erfc", self)

    def exp(self) -> Expression:
        return unary("exp", self)

    def expm1(self) -> Expression:
        return unary("expm1", self)

    def floor(self) -> Expression:
        return unary("floor", self)

    def log(self) -> Expression:
        return unary("log", self)

    def log1p(self) -> Expression:
        return unary("log1p", self)

    def neg(self) -> Expression:
        return unary("neg", self)

    def rsqrt(self) -> Expression:
        return unary("rsqrt", self)

    def sgn(self) -> Expression:
        return unary("sgn", self)

    def sigmoid(self) -> Expression:
        return unary("sigmoid", self)

    def sin(self) -> Expression:
        return unary("sin", self)

    def sqrt(self) -> Expression:
        return unary("sqrt", self)

    def tanh(self) -> Expression:
        return unary("tanh", self)

    sign = sgn
    __abs__ = abs
    __neg__ = neg
    __add__ = __radd__ = add
    __mul__ = __rmul__ = mul
    __sub__ = sub
    __truediv__ = div
    __pow__ = pow

    def __rsub__(self, other: Term) -> Expression:
        return binary("sub", other, self)

    def __rtruediv__(self, other: Term) -> Expression:
        return binary("div", other, self)

    def __rpow__(self, base: Term) -> Expression:
        return binary("pow", base, self)

    def __lt__(self, other: Term) -> Expression:
        return binary("lt", self, other)

    def __le__(self, other: Term) -> Expression:
        return binary("le", self, other)

    def __gt__(self, other: Term) -> Expression:
        return binary("gt", self, other)

    def __ge__(self, other: Term) -> Expression:
        return binary("ge", self, other)

    def __eq__(self, other: object) -> Expression:  # type: ignore[override]
        return binary("eq", self, other)

    def __ne__(self, other: object) -> Expression:  # type: ignore[override]
        return binary("ne", self, other)

    __hash__ = object.__hash__

    def __and__(self, other: Expression) -> Expression:
        return Expression("and", self, other)

    def __or__(self, other: Expression) -> Expression:
        return Expression("or", self, other)

    def __invert__(self) -> Expression:
        return Expression("not", self)


#: Answers what a condition in an ``if`` is, or None if that is not known.
Decision = Callable[[Expression], "bool | None"]
_decide: ContextVar[Decision] = ContextVar("decide", default=lambda condition: None)


@contextmanager
def deciding(decide: Decision) -> Iterator[None]:
    """Let formulas branch on the conditions that this function knows."""
    token = _decide.set(decide)
    try:
        yield
    finally:
        _decide.reset(token)


_interned: weakref.WeakValueDictionary[tuple[Any, ...], Expression] = weakref.WeakValueDictionary()


def _exact(x: Any) -> Any:
    return x.hex() if isinstance(x, float) else x  # −0 is not 0, and NaN is itself


def _is_one(x: Term) -> bool:
    return isinstance(x, (int, float)) and x == 1


def unary(op: str, x: Expression) -> Expression:
    return Expression(op, x)


def binary(op: str, a: Term, b: Term) -> Expression:
    """The operation, less what changes nothing: factors of 1, and arithmetic of constants."""
    a, b = Expression.of(a), Expression.of(b)
    if a.value is not None and b.value is not None and op in ("add", "sub", "mul", "div", "pow"):
        folded = _fold(op, a.value, b.value)
        if folded is not None:
            return Expression.of(folded)
    if op in ("mul", "div") and b.value == 1:
        return a
    if op == "mul" and a.value == 1:
        return b
    if op == "mul" and b.value is not None:
        a, b = b, a  # constants first: 2·x and x·2 are one expression
    return Expression(op, a, b)


def _fold(op: str, a: float, b: float) -> float | None:
    try:
        result = {"add": a + b, "sub": a - b, "mul": a * b}.get(op)
        result = a / b if op == "div" else a**b if op == "pow" else result
    except (ZeroDivisionError, OverflowError):
        return None
    return result if isinstance(result, float) and math.isfinite(result) else None


def fma(a: Term, b: Term, c: Term) -> Expression:
    """a·b + c, rounded once where the machine can."""
    return Expression("fma", Expression.of(a), Expression.of(b), Expression.of(c))


def where(condition: Any, a: Term, b: Term) -> Any:
    """a where the condition holds, else b; of tensors as ``torch.where``, of expressions recorded.

    A number stands for a tensor of the other's dtype.

    >>> where(torch.tensor([True, False]), torch.ones(2, dtype=torch.bfloat16), 0)
    tensor([1., 0.], dtype=torch.bfloat16)
    """
    if isinstance(condition, Expression):
        return _where(condition, a, b)
    if isinstance(condition, Tensor) or isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def _where(condition: Term, a: Term, b: Term) -> Expression:
    if not isinstance(condition, Expression) or not condition.is_condition:
        raise TypeError(f"where() needs a comparison such as x > 0 as its condition, not {condition}")
    a, b = Expression.of(a), Expression.of(b)
    return a if a is b else Expression("where", condition, a, b)


def maximum(a: Term, b: Term) -> Any:
    """The larger one; NaN if one is NaN. At a = b the derivative is a subgradient: write the slope yourself.

    >>> maximum(torch.tensor([1.0, 3.0]), 2)
    tensor([2., 3.])
    """
    return _extreme("maximum", a, b)


def minimum(a: Term, b: Term) -> Any:
    """The smaller one; NaN if one is NaN.

    >>> minimum(torch.tensor([1.0, 3.0]), 2)
    tensor([1., 2.])
    """
    return _extreme("minimum", a, b)


def times(c: Term, s: Term) -> Any:
    """c·s with 0·∞ = 0: what does not occur adds nothing to a sum over what may, however surprising it is.

    >>> times(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([torch.inf, 1.0, torch.inf]))
    tensor([0., 0., inf])
    """
    # Of 0·s itself, since a selection wherever c = 0 would hide from autograd that its derivative by c is s.
    return where((c == 0) & (abs(s) == math.inf), 0, c * s)


def _extreme(name: str, a: Term, b: Term) -> Any:
    if isinstance(a, Expression) or isinstance(b, Expression):
        return binary(name, a, b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return getattr(torch, name)(a, b)
    if isinstance(b, Tensor):
        a, b = b, a
    if isinstance(a, Tensor):
        return a.clamp(min=b) if name == "maximum" else a.clamp(max=b)
    return max(a, b) if name == "maximum" else min(a, b)


def walk(roots: Iterable[Expression]) -> Iterator[Expression]:
    """Every node once, arguments before what is made of them."""
    seen: set[int] = set()

    def visit(e: Expression) -> Iterator[Expression]:
        if id(e) in seen:
            return
        seen.add(id(e))
        for child in e.children:
            yield from visit(child)
        yield e

    for root in roots:
        yield from visit(root)
