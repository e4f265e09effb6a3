"""Differentiable pointwise functions from a formula: the value and its slopes, a few lines each.

:func:`pointwise` takes them as they stand in the file of the function and makes everything else:

- the reference, which runs the lines on tensors: on every device, dtype and layout, traced, transformed, and
  differentiated again (:class:`torchcalc.autograd.Function`);
- on CPU one C++ loop for the value and one for each gradient, generated at build, and an autograd node in C++ that calls
  them, since a backward in Python costs what torch's whole call does;
- on a GPU the same as Triton kernels, at first use;
- the expressions that tests prove: each slope *is* the derivative of the value.

Which it is never changes the meaning: kernels compute half types in float32 and round once, as the reference does.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.nn import _reduction

from torchcalc.autograd import Autocast, Function
from torchcalc.formula import dispatch
from torchcalc.formula.expression import Expression
from torchcalc.losses.reduction import per_element, reduce, weighted
from torchcalc.promotion import autocasts, widen

__all__ = ["FORMULAS", "Formula", "loss", "pointwise"]

#: Every formula by its name, in the order of definition: what is built, and what tests prove.
FORMULAS: dict[str, Formula] = {}


def _place(f: Callable[..., Any]) -> tuple[str, str, int | None]:
    """What stays where a module, or a cell of a notebook, runs once more."""
    code = getattr(f, "__code__", None)
    return f.__module__, f.__qualname__, code and code.co_firstlineno


@dataclass(frozen=True, eq=False)
class Formula:
    """A pointwise function y = value(inputs; parameters) and its slopes.

    A slope's arguments are named after what it needs: inputs, the output ``y``, parameters, and ``g``, the gradient that
    comes in. One that takes g returns the product of the slope with it: where a slope of 0 must win over an infinite g,
    it selects instead of multiplying.

    Attributes:
        name: names the kernels, and the backward in a graph: "SiLU" is ``SiLUBackward``.
        value: the function.
        slopes: ∂y/∂input for each input; None where there is none.
        inputs: names of the tensors.
        parameters: names of the numbers: the keyword-only arguments of value.
        whole: whether there is a kernel for value and gradients together, for what keeps the inputs alone.
    """

    name: str
    value: Callable[..., Any]
    slopes: Sequence[Callable[..., Any] | None]
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    whole: bool = False

    def product(self, i: int, known: dict[str, Any]) -> Any:
        """g·∂y/∂input i, where ``known`` has g, the inputs, y, and the parameters by name."""
        slope = self.slopes[i]
        assert slope is not None
        result = slope(**{name: known[name] for name in self.arguments[i]})
        return result if "g" in self.arguments[i] else known["g"] * result

    @staticmethod
    def define(
        name: str, value: Callable[..., Any], slopes: Sequence[Callable[..., Any] | None], whole: bool = False
    ) -> Formula:
        """Make the formula and enter it into FORMULAS, where its name must be new, or that of what its file defined before."""
        parameters = inspect.signature(value).parameters.values()
        inputs = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        numbers = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        if len(slopes) != len(inputs):
            raise TypeError(f"{name} has the inputs {inputs} and {len(slopes)} slopes; give one for each, or None")
        formula = Formula(name, value, tuple(slopes), inputs, numbers, whole)
        known = {*inputs, *numbers, "y", "g"}
        for i, names in enumerate(formula.arguments):
            if unknown := set(names) - known:
                raise TypeError(f"{name}: the slope of {inputs[i]} takes {sorted(unknown)}; known are {sorted(known)}")
        if name in FORMULAS and _place(FORMULAS[name].value) != _place(value):
            raise ValueError(f"there is a formula {name} already; give this one a name of its own")
        FORMULAS[name] = formula
        return formula

    def on_tensors(self, *args: Any) -> Tensor:
        """The value of inputs and parameters: half types in float32, rounded once."""
        tensors, numbers = args[: len(self.inputs)], args[len(self.inputs) :]
        y: Tensor = self.value(*map(widen, tensors), **dict(zip(self.parameters, numbers, strict=True)))
        return y.to(functools.reduce(torch.promote_types, (x.dtype for x in tensors)))

    def known(self, saved: Iterable[Tensor], numbers: Iterable[float]) -> dict[str, Any]:
        """What backward knows, by name."""
        return dict(zip(self.saved, saved, strict=True)) | dict(zip(self.parameters, numbers, strict=True))

    @functools.cached_property
    def arguments(self) -> tuple[tuple[str, ...], ...]:
        """Of each slope the names of its arguments."""
        return tuple(() if s is None else tuple(inspect.signature(s).parameters) for s in self.slopes)

    @functools.cached_property
    def saved(self) -> tuple[str, ...]:
        """What backward needs: inputs, and "y"."""
        needed = {name for names in self.arguments for name in names}
        return tuple(name for name in (*self.inputs, "y") if name in needed)

    @functools.cached_property
    def symbols(self) -> dict[str, Expression]:
        """What the lines are recorded with."""
        inputs = {name: Expression.input(name) for name in (*self.inputs, "y", "g")}
        return inputs | {name: Expression.parameter(name) for name in self.parameters}

    @functools.cached_property
    def expression(self) -> Expression:
        """The value, recorded."""
        return Expression.of(self.value(**{name: self.symbols[name] for name in (*self.inputs, *self.parameters)}))

    @functools.cached_property
    def products(self) -> tuple[Expression | None, ...]:
        """The gradient of each input, recorded."""
        return tuple(
            None if s is None else Expression.of(self.product(i, self.symbols)) for i, s in enumerate(self.slopes)
        )

    @functools.cached_property
    def together(self) -> dict[str, Expression]:
        """What the whole kernel computes of g and the inputs: the gradient of each, by its name, and the value as "y"."""
        known = {**self.symbols, "y": self.expression}
        products = {x: Expression.of(self.product(i, known)) for i, x in enumerate(self.inputs)}
        return {**products, "y": self.expression}

    @functools.cached_property
    def weighted(self) -> Formula:
        """weight·value, of one more input, which gets no gradient."""
        w = Expression.input("weight")
        formula = Formula(f"Weighted{self.name}", self.value, self.slopes, (*self.inputs, "weight"), self.parameters)
        formula.__dict__["expression"] = w * self.expression
        formula.__dict__["products"] = (*(None if p is None else w * p for p in self.products), None)
        return formula

    @functools.cached_property
    def unconnected(self) -> tuple[tuple[str, ...], ...]:
        """Of each product what it depends on by comparisons alone: autograd would call its derivative unused, not zero."""
        return tuple(() if p is None else tuple(sorted(p.inputs() - _followed(p))) for p in self.products)

    @functools.cached_property
    def hash(self) -> str:
        """Identifies what was recorded: a kernel made from another formula of this name is not used."""
        text = f"{self.inputs} {self.parameters} {self.expression} {self.products}{' whole' if self.whole else ''}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _followed(e: Expression) -> set[str]:
    """The inputs that autograd would reach from e."""
    if e.op == "input":
        return {e.args[0]}
    return set().union(*(_followed(a) for a in e.children if not a.is_condition))


def pointwise(
    name: str,
    value: Callable[..., Any],
    *slopes: Callable[..., Any] | None,
    torch_value: Callable[..., Tensor] | None = None,
    autocast: Autocast = "off",
    holomorphic: bool = True,
    whole: bool = False,
) -> Callable[..., Tensor]:
    """The differentiable function with this value and these slopes, broadcasting its inputs.

    Args:
        name: see :class:`Formula`; unique.
        value: ``value(x, ..., *, parameter, ...)`` in the algebra of :mod:`torchcalc.formula.expression`.
        slopes: one for each input of value, or None.
        torch_value: torch's own operation of the same arguments, where there is one: it computes the value where no
            kernel does, integers and complex numbers too.
        autocast: see :class:`torchcalc.autograd.Function`.
        holomorphic: whether the slope of a complex input is the complex derivative; else it is the gradient.
        whole: see :class:`Formula`.

    Returns:
        A function of the inputs and then the parameters, all positional.

    Raises:
        TypeError: if the slopes do not fit the value.

    >>> cube = pointwise("Cube", lambda x: x * x * x, lambda x: 3 * x * x)
    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> torch.autograd.grad(cube(x), x)
    (tensor(12.),)
    """
    formula = Formula.define(name, value, slopes, whole)
    n = len(formula.inputs)

    def forward(*args: Any) -> Tensor:
        return (torch_value or formula.on_tensors)(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.numbers = inputs[n:]
        known = {**dict(zip(formula.inputs, inputs, strict=False)), "y": output}
        ctx.save_for_backward(*(known[name] for name in formula.saved))
        ctx.inputs = [(x.shape, x.dtype) for x in inputs[:n]]
        ctx.output = output.shape, output.dtype

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:n]
        known = formula.known(ctx.saved_tensors, ctx.numbers)
        grads = gradients(formula, grad_output, known, needed, ctx.inputs, holomorphic)
        return *grads, *(None for _ in ctx.numbers)

    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        shape, dtype = ctx.output
        dy = change(formula, tangents[:n], ctx.saved_tensors, ctx.numbers, conjugate=not holomorphic)
        return (dy.real if dy.is_complex() and not dtype.is_complex else dy).expand(shape).to(dtype)

    return dispatch.elementwise(formula, _function(formula, autocast, forward, setup_context, backward, jvp))


def _function(formula: Formula, autocast: Autocast, *methods: Callable[..., Any]) -> Callable[..., Tensor]:
    members = {f.__name__: staticmethod(f) for f in methods}
    function: type[Function] = type(formula.name, (Function,), {"autocast": autocast, **members})
    return function.apply


def gradients(
    formula: Formula,
    g: Tensor,
    known: dict[str, Any],
    needed: Sequence[bool],
    inputs: Sequence[tuple[torch.Size, torch.dtype]] | None = None,
    holomorphic: bool = True,
) -> list[Tensor | None]:
    """g·∂y/∂input for each needed input, by differentiable operations; in the shapes and dtypes of inputs, if given.

    Of a holomorphic function of complex numbers it is the product with the conjugate slope, as torch defines it.
    """
    known = {**known, "g": g}
    for name, x in known.items():
        if isinstance(x, Tensor):
            known[name] = widen(x).conj() if holomorphic and x.is_complex() and name != "g" else widen(x)
    grads: list[Tensor | None] = []
    for i, need in enumerate(needed):
        if not need:
            grads.append(None)
            continue
        grad = connected(formula.product(i, known), [known[name] for name in formula.unconnected[i] if name != "g"])
        if inputs is not None:
            shape, dtype = inputs[i]
            grad = (grad.real if grad.is_complex() and not dtype.is_complex else grad).sum_to_size(shape).to(dtype)
        grads.append(grad)
    return grads


def change(
    formula: Formula,
    tangents: Sequence[Tensor | None],
    saved: Iterable[Tensor],
    numbers: Iterable[float],
    conjugate: bool = False,
) -> Tensor:
    """Σ ∂y/∂input·tangent: the Jacobian is diagonal."""
    known = formula.known((widen(x).conj() if conjugate else widen(x) for x in saved), numbers)
    parts = [formula.product(i, {**known, "g": widen(t)}) for i, t in enumerate(tangents) if t is not None]
    return functools.reduce(operator.add, parts)


def connected(grad: Tensor, others: Sequence[Any]) -> Tensor:
    """The same, as a function of the others too, on which it does not depend: so its derivative is zero, and not unused."""
    if torch.is_grad_enabled():
        for x in others:
            if isinstance(x, Tensor) and (x.requires_grad or _are_functorch_transforms_active()):
                grad = torch.where(torch.zeros((), dtype=torch.bool, device=x.device), x.to(grad.dtype), grad)
    return grad


def loss(
    name: str,
    value: Callable[..., Any],
    *slopes: Callable[..., Any] | None,
    torch_value: Callable[..., Tensor] | None = None,
) -> Callable[..., Tensor]:
    """The differentiable loss L = reduce(ℓ) with ℓ = value(inputs; parameters), reduced in the pass that computes it.

    By the chain rule ∂L/∂input = ∂ℓ/∂input·∂L/∂ℓ, where ∂L/∂ℓ is what reduction.py derives. Autocast computes it in float32.

    Args:
        name, value, slopes: as for :func:`pointwise`. Of complex inputs the slope is the gradient, torch's conjugate.
        torch_value: torch's own loss ``torch_value(*inputs, reduction as torch's enum, *parameters)``, used where no
            kernel is; it gets half types as float32.

    Returns:
        A function ``(*inputs, weight, reduction, by_weight, *parameters)``; weight is None or of the inputs' common shape,
        by_weight says whether a mean is over the sum of the weights.
    """
    formula = Formula.define(name, value, slopes)
    n = len(formula.inputs)

    def forward(*args: Any) -> Tensor:
        inputs, reduction, numbers = args[:n], args[n], args[n + 1 :]
        enum = _reduction.get_enum(reduction)  # raises if there is no such reduction
        dtypes = {x.dtype for x in inputs}
        if torch_value and len(dtypes) > 1:  # torch's own choice of a dtype
            return torch_value(*inputs, enum, *numbers)
        wide = [widen(x) for x in inputs]
        if torch_value:
            y = torch_value(*wide, enum, *numbers)
        else:
            y = reduce(formula.on_tensors(*wide, *numbers), reduction)
        dtype = functools.reduce(torch.promote_types, dtypes)
        return y.to(dtype if y.is_complex() else dtype.to_real())

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors, ctx.reduction, ctx.numbers = inputs[:n], inputs[n], inputs[n + 1 :]
        ctx.save_for_backward(*(x for name, x in zip(formula.inputs, tensors, strict=True) if name in formula.saved))
        ctx.inputs = [(x.shape, x.dtype) for x in tensors]
        ctx.shape = torch.broadcast_shapes(*(x.shape for x in tensors))
        ctx.dtype = output.dtype

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # In the loss's shape, which the slopes need not have where inputs were broadcast.
        g = per_element(widen(grad_output), ctx.reduction, ctx.shape.numel()).expand(ctx.shape)
        needed = ctx.needs_input_grad[:n]
        known = formula.known(ctx.saved_tensors, ctx.numbers)
        grads = gradients(formula, g, known, needed, ctx.inputs, holomorphic=False)
        return *grads, None, *(None for _ in ctx.numbers)

    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        each = change(formula, tangents[:n], ctx.saved_tensors, ctx.numbers, conjugate=True)
        each = (each.real if each.is_complex() else each).expand(ctx.shape)
        return reduce(each, ctx.reduction).to(ctx.dtype)

    function = _function(formula, "float32", forward, setup_context, backward, jvp)

    def apply(*args: Any) -> Tensor:
        *inputs, weight, reduction, by_weight = args[: n + 3]
        numbers = args[n + 3 :]
        if weight is None:
            return function(*inputs, reduction, *numbers)
        result = weighted(function(*map(widen, inputs), "none", *numbers), widen(weight), reduction, by_weight)
        if autocasts(result):
            return result
        return result.to(functools.reduce(torch.promote_types, (x.dtype for x in (*inputs, weight))))  # rounded once

    return dispatch.reduced(formula, apply)
