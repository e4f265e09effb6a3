"""Checks of the first derivative: reverse and forward mode, against differences and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchcalc.testing.diagnosis import compare
from torchcalc.testing.differences import slopes_along
from torchcalc.testing.graph import own_rule
from torchcalc.testing.numeric import (
    Inputs,
    along_all,
    directions,
    first_order,
    flat,
    magnitude,
    need_derivatives,
    of_input,
    slack,
    tolerance,
    unsupported,
)
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, normal, pull, said


@check("function", "differentiable")
def differentiable(subject: Subject) -> Finding | None:
    """Every float input that changes the output gets a derivative, or refuses clearly."""
    inputs, silent = subject.floats(), []
    for i in subject.wrt:
        x = inputs[i]
        _, (grad,) = subject.gradients(inputs, (i,))
        if grad is None and x.numel():
            slopes = slopes_along(of_input(subject, inputs, i), x, normal(x, 11))
            if bool((slopes.usable & (slopes.value.abs() > 1e2 * tolerance(slopes))).any()):
                silent.append((i, float(slopes.value[slopes.usable].abs().max())))
    if silent:
        i, size = silent[0]
        text = f"the output changes with {subject.label(i)}, at a rate of {size:.3g}, but no derivative comes back"
        return Finding("", "error", "None", text, f"None returned for {subject.label(i)}")
    if subject.refused:
        text = "; ".join(f"{subject.label(i)}: {message}" for i, message in subject.refused.items())
        return Finding("", "note", f"{len(subject.refused)} refused", text, "refuses to be differentiated")
    return Finding("", figure=f"{len(subject.wrt)} inputs")


@check("function", "gradient")
def gradient(subject: Subject) -> Finding:
    """J'v against Richardson differences, element by element."""
    return first_order(subject, subject.floats())


@check("function", "linear backward")
def linear_backward(subject: Subject) -> Finding | None:
    """J'(2v - w) = 2J'v - J'w: backward is linear in grad_output, and zero for zero."""
    need_derivatives(subject)
    inputs = subject.floats()
    outputs, grads = subject.gradients(inputs)
    v, w = subject.incoming(outputs), subject.incoming(outputs, 31)
    _, other = subject.gradients(inputs, incoming=w)
    _, both = subject.gradients(inputs, incoming=[2 * a - b for a, b in zip(v, w, strict=True)])
    _, zero = subject.gradients(inputs, incoming=[torch.zeros_like(a) for a in v])
    for i, gv, gw, g, z in zip(subject.wrt, grads, other, both, zero, strict=True):
        if gv is None or gw is None:
            continue
        allowed = slack(subject, gv, gw)
        name = f"gradient of {subject.label(i)} for grad_output"
        found = compare(f"{name} 2v - w", g, 2 * gv - gw, allowed, names=("J'(2v - w)", "2J'v - J'w")) or compare(
            f"{name} 0", z, torch.zeros_like(gv), allowed, names=("J'0", "0")
        )
        if found is not None:
            alone = torch.equal(gv, gw)
            return replace(found, cause="grad_output ignored" if alone else "backward is not linear in grad_output")
    return None


def tangent(subject: Subject, inputs: Inputs, u: Sequence[Tensor]) -> list[Tensor | None]:
    """Ju of every output by forward mode."""
    with forward_ad.dual_level():
        dual = list(inputs)
        for i, direction in zip(subject.wrt, u, strict=True):
            dual[i] = forward_ad.make_dual(inputs[i], direction)
        return [forward_ad.unpack_dual(y).tangent for y in subject.call(*dual)]


@check("function", "adjoint")
def adjoint(subject: Subject) -> Finding | None:
    """<v, Ju> = <J'v, u> to rounding, where Ju comes from forward mode, or from backward differentiated by v."""
    need_derivatives(subject)
    inputs = subject.floats()
    leaves = subject.leaves(inputs, subject.wrt)
    outputs = subject.call(*leaves)
    u, v = directions(subject, inputs), subject.incoming(outputs)
    grads = pull(outputs, [leaves[i] for i in subject.wrt], v)
    right = sum(((g * d).sum() for g, d in zip(grads, u, strict=True) if g is not None), u[0].new_zeros(()))
    size = sum((float((g * d).abs().sum()) for g, d in zip(grads, u, strict=True) if g is not None), 0.0)
    try:
        pushed, how = tangent(subject, inputs, u), "forward mode"
    except CLEAR:
        pushed, how = twice(outputs, [leaves[i] for i in subject.wrt], v, u), "backward twice"
    if not size and all(p is None for p in pushed):
        return Finding("", figure="both are zero")
    left = sum(((p * w).sum() for p, w in zip(pushed, v, strict=True) if p is not None), u[0].new_zeros(()))
    size += sum((float((p * w).abs().sum()) for p, w in zip(pushed, v, strict=True) if p is not None), 0.0)
    allowed = 1e3 * torch.finfo(subject.exact).eps * (size + magnitude(subject, inputs))
    names = ("<v, Ju>", "<J'v, u>")
    found = compare(f"Ju by {how}", left.detach().reshape(()), right.detach().reshape(()), allowed, names=names)
    gap = float((left - right).abs().detach())
    return found or Finding("", figure=f"{gap:.1e} of {allowed:.1e} allowed, by {how}")


def twice(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], v: Sequence[Tensor], u: Sequence[Tensor]
) -> list[Tensor | None]:
    """Ju as the derivative of J'v by v."""
    vs = [w.clone().requires_grad_() for w in v]
    try:
        grads = pull(outputs, leaves, vs, create_graph=True)
    except CLEAR as error:
        raise Skip(f"neither forward mode nor backward twice: {said(error)}") from error
    pairs = [(g, d) for g, d in zip(grads, u, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        raise Skip("neither forward mode nor backward twice")
    gs, ds = zip(*pairs, strict=True)
    try:
        return list(torch.autograd.grad(gs, vs, ds, allow_unused=True))
    except CLEAR as error:
        raise Skip(f"neither forward mode nor backward twice: {error}") from error


@check("function", "forward mode")
def forward_mode(subject: Subject) -> Finding | None:
    """Ju of forward mode against Richardson differences; a tangent that is silently zero is an error."""
    need_derivatives(subject)
    inputs = subject.floats()
    u = directions(subject, inputs)
    try:
        tangents = tangent(subject, inputs, u)
    except CLEAR as error:
        found = unsupported("forward mode", error)
        with_graph = subject.call(*subject.leaves(inputs, subject.wrt))
        return replace(found, verdict="error", cause="its jvp raises") if own_rule(with_graph, "jvp") else found
    slopes = along_all(subject, inputs, u)
    shapes = subject.call(*inputs)
    pushed = [torch.zeros_like(y) if t is None else t for t, y in zip(tangents, shapes, strict=True)]
    wrong = compare("tangent of the output", flat(pushed), slopes.value, tolerance(slopes), use=slopes.usable)
    if wrong is not None and wrong.cause == "silently zero":
        wrong = replace(wrong, cause="forward derivative silently zero")
    return wrong or Finding("", figure=f"{int(slopes.usable.sum())} outputs")
