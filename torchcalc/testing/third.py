"""The third derivative: where the second can be differentiated, its derivative is right, and not silently zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import compare
from torchcalc.testing.differences import least_scale, slopes_along
from torchcalc.testing.graph import custom
from torchcalc.testing.numeric import magnitude, need_derivatives, tolerance, unsupported
from torchcalc.testing.registry import check
from torchcalc.testing.report import Finding
from torchcalc.testing.second import scalar_slope
from torchcalc.testing.subject import CLEAR, Subject, dot, normal


def curvature(subject: Subject, inputs: Sequence[Any], w: Sequence[Tensor], graph: bool) -> tuple[Tensor, list[Tensor]]:
    """(w'Hw of <v, f>, the leaves)."""
    slope, leaves = scalar_slope(subject, inputs, w, create_graph=True)
    xs = [leaves[i] for i in subject.wrt]
    grads: Sequence[Tensor | None] = [None] * len(xs)
    if slope.requires_grad:
        grads = torch.autograd.grad(slope, xs, create_graph=graph, allow_unused=True)
    return dot(grads, w, xs[0]), xs


@check("function", "third derivative")
def third_derivative(subject: Subject) -> Finding | None:
    """Backward differentiated twice, along a direction, against differences of the second derivative."""
    need_derivatives(subject)
    inputs = subject.floats()
    w = [normal(inputs[i], 41 + i) for i in subject.wrt]
    u = [normal(inputs[i], 61 + i) for i in subject.wrt]
    try:
        second, xs = curvature(subject, inputs, w, graph=True)
        grads: Sequence[Tensor | None] = [None] * len(xs)
        if second.requires_grad:
            grads = torch.autograd.grad(second, xs, allow_unused=True)
    except CLEAR as error:
        return unsupported("third derivative", error)

    def moved(t: Tensor) -> Tensor:
        at = list(inputs)
        for i, direction in zip(subject.wrt, u, strict=True):
            at[i] = inputs[i] + t * direction
        return curvature(subject, at, w, graph=False)[0].detach().reshape(1)

    zero = inputs[subject.wrt[0]].new_zeros(())
    scale = least_scale([inputs[i] for i in subject.wrt], u)
    slope = slopes_along(moved, zero, torch.ones_like(zero), scale, magnitude(subject, inputs))
    if not bool(slope.usable.all()) or float(tolerance(slope)) > 0.01 * max(1.0, float(slope.value.abs())):
        return Finding("", "not checked", diagnosis="no difference of the second derivative is exact enough")
    actual = dot(grads, u, zero).reshape(1)
    found = compare("third derivative along a direction", actual, slope.value, tolerance(slope))
    if found is None:
        return Finding("", figure="along a direction")
    soft = not custom(subject.call(*subject.leaves(inputs, subject.wrt)))  # derivatives of torch alone
    words = (
        "third derivative silently zero"
        if found.cause == "silently zero"
        else f"third derivative {found.cause or 'wrong'}"
    )
    return replace(found, cause=words, verdict="note" if soft else found.verdict)
