"""Checks of the second derivative: reverse over reverse, forward over reverse, and backward differentiated by v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import compare, regions
from torchcalc.testing.differences import Slopes, element_slopes, least_scale, slopes_along
from torchcalc.testing.numeric import (
    Inputs,
    along_all,
    chosen,
    directions,
    flat,
    magnitude,
    need_derivatives,
    need_the_same_draws,
    quick,
    spread_out,
    tolerance,
    unsupported,
    weighted_sum,
)
from torchcalc.testing.registry import check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, dot, normal, pull


def scalar_slope(
    subject: Subject, inputs: Inputs, w: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, list[Any]]:
    """(<J'v, w>, leaves), a scalar function of the inputs whose gradient is the second derivative."""
    leaves = subject.leaves(inputs, subject.wrt)
    outputs = subject.call(*leaves)
    grads = pull(outputs, [leaves[i] for i in subject.wrt], subject.incoming(outputs), create_graph)
    return dot(grads, w, inputs[subject.wrt[0]]), leaves


def second_slopes(subject: Subject, inputs: Inputs, w: Sequence[Tensor], i: int, indices: Sequence[int]) -> Slopes:
    """Differences of <J'v, w> by elements of input i."""

    def f(x: Tensor) -> Tensor:
        return scalar_slope(subject, [*inputs[:i], x, *inputs[i + 1 :]], w)[0].detach().reshape(1)

    return element_slopes(f, inputs[i], inputs[i].new_ones(1), indices, magnitude(subject, inputs))


def second_order(
    subject: Subject, hessian_products: Sequence[Tensor | None], w: Sequence[Tensor], inputs: Inputs, how: str
) -> Finding:
    """Hw of every input against differences of the first derivative; by element where one direction of all fails."""
    u = [normal(inputs[i], 41 + i) for i in subject.wrt]

    def moved(t: Tensor) -> Tensor:
        at = list(inputs)
        for i, direction in zip(subject.wrt, u, strict=True):
            at[i] = inputs[i] + t * direction
        return scalar_slope(subject, at, w)[0].detach().reshape(1)

    zero = inputs[subject.wrt[0]].new_zeros(())
    scale = least_scale([inputs[i] for i in subject.wrt], u)
    slope = slopes_along(moved, zero, torch.ones_like(zero), scale, magnitude(subject, inputs))
    gap = (dot(hessian_products, u, zero) - slope.value).abs()
    if bool((slope.usable & (gap <= tolerance(slope))).all()):
        return Finding("", figure=how)
    for i, product in zip(subject.wrt, hessian_products, strict=True):
        x = inputs[i]
        indices = chosen(x)
        if not indices:
            continue
        slopes = second_slopes(subject, inputs, w, i, indices)
        value, allowed, use = spread_out(slopes, x, indices)
        found = compare(
            f"second derivative by {subject.label(i)}, {how}", product, value, allowed, use=use, regions=regions(x)
        )
        if found is not None:
            zero = found.cause in ("silently zero", "None returned")
            words = "second derivative silently zero" if zero else found.cause
            if zero and quick(subject, inputs).verdict != "error":
                words = f"first derivative right, {words}"
            return replace(found, cause=words)
    return Finding("", figure=how)


@check("function", "second derivative")
def second_derivative(subject: Subject) -> Finding | None:
    """Reverse over reverse against differences of the first derivative."""
    need_derivatives(subject)
    inputs = subject.floats()
    w = directions(subject, inputs)
    try:
        slope, leaves = scalar_slope(subject, inputs, w, create_graph=True)
        xs = [leaves[i] for i in subject.wrt]
        products = torch.autograd.grad(slope, xs, allow_unused=True) if slope.requires_grad else (None,) * len(xs)
    except CLEAR as error:
        return unsupported("second derivative", error)
    return second_order(subject, products, w, inputs, "reverse over reverse")


@check("function", "derivative by grad_output")
def derivative_by_grad_output(subject: Subject) -> Finding | None:
    """The derivative of J'v by v is J: backward differentiated by grad_output against differences of the function."""
    need_derivatives(subject)
    inputs = subject.floats()
    leaves = subject.leaves(inputs, subject.wrt)
    outputs = subject.call(*leaves)
    u = directions(subject, inputs)
    v = [w.requires_grad_() for w in subject.incoming(outputs)]
    try:
        slope = dot(pull(outputs, [leaves[i] for i in subject.wrt], v, True), u, u[0])
        products = torch.autograd.grad(slope, v, allow_unused=True) if slope.requires_grad else (None,) * len(v)
    except CLEAR as error:
        return unsupported("second derivative", error)
    slopes = along_all(subject, inputs, u)
    pushed = flat([torch.zeros_like(y) if p is None else p for p, y in zip(products, outputs, strict=True)]).detach()
    found = compare("derivative of J'v by v", pushed, slopes.value, tolerance(slopes), use=slopes.usable)
    if found is not None and found.cause == "silently zero":
        return replace(found, cause="derivative by grad_output silently zero")
    return found


@check("function", "forward over reverse")
def forward_over_reverse(subject: Subject) -> Finding | None:
    """The tangent of the gradient, as torch.func.hessian computes it, against differences of the first derivative."""
    need_derivatives(subject)
    inputs = subject.floats()
    w = directions(subject, inputs)
    need_the_same_draws(subject, *weighted_sum(subject, inputs))

    def gradients(*xs: Tensor) -> tuple[Tensor, ...]:
        arguments = list(inputs)
        for i, x in zip(subject.wrt, xs, strict=True):
            arguments[i] = x
        outputs = subject.call(*arguments)
        return sum((y * v).sum() for y, v in zip(outputs, subject.incoming(outputs), strict=True))  # type: ignore[return-value]

    try:
        xs = tuple(inputs[i] for i in subject.wrt)
        order = tuple(range(len(xs)))
        products = torch.func.jvp(torch.func.grad(gradients, argnums=order), xs, tuple(w))[1]
    except CLEAR as error:
        return unsupported("forward over reverse", error)
    return second_order(subject, products, w, inputs, "forward over reverse")
