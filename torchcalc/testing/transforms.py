"""Checks of the transforms of torch: torch.func, vmap, batched gradients, checkpointing, compile.

What a subject does not claim and refuses clearly is a note; a result that differs from eager autograd is an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchcalc.testing.contract import agree
from torchcalc.testing.diagnosis import compare
from torchcalc.testing.differences import least_scale, slopes_along
from torchcalc.testing.graph import own_rule
from torchcalc.testing.numeric import (
    Scalar,
    magnitude,
    need_derivatives,
    need_the_same_draws,
    tolerance,
    unsupported,
    weighted_sum,
)
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, dense, dot, normal, pull


def eager(call: Scalar, xs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    leaves = [x.clone().requires_grad_() for x in xs]
    return pull([call(*leaves)], leaves, [leaves[0].new_ones(())])


def zeros_for_none(grads: Sequence[Tensor | None], xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True)]


@check("function", "func.grad")
def func_grad(subject: Subject) -> Finding | None:
    """torch.func.grad equals autograd."""
    need_derivatives(subject)
    call, xs = weighted_sum(subject, subject.floats())
    need_the_same_draws(subject, call, xs)
    try:
        grads = tuple(map(dense, torch.func.grad(call, tuple(range(len(xs))))(*xs)))
    except CLEAR as error:
        return unsupported("torch.func.grad", error)
    return agree(subject, "by torch.func.grad", grads, zeros_for_none(eager(call, xs), xs), ("func.grad", "autograd"))


@check("function", "func.jvp")
def func_jvp(subject: Subject) -> Finding | None:
    """torch.func.jvp equals the product with the gradient of autograd."""
    need_derivatives(subject)
    call, xs = weighted_sum(subject, subject.floats())
    u = tuple(normal(x, 17 + k) for k, x in enumerate(xs))
    need_the_same_draws(subject, call, xs)
    try:
        slope = torch.func.jvp(call, xs, u)[1]
    except CLEAR as error:
        return unsupported("forward mode", error)
    grads = zeros_for_none(eager(call, xs), xs)
    expected = dot(grads, u, xs[0])
    size = sum(float((g * d).abs().sum()) for g, d in zip(grads, u, strict=True)) + magnitude(subject, subject.floats())
    if abs(float(slope - expected)) <= 1e4 * torch.finfo(subject.exact).eps * size:
        return None
    zero = float(slope) == 0
    text = f"along a direction func.jvp gives {float(slope):.10g}, autograd {float(expected):.10g}"
    return Finding(
        "", "error", f"{float(slope - expected):.1e}", text, "forward derivative silently zero" if zero else ""
    )


@check("function", "hessian")
def hessian(subject: Subject) -> Finding | None:
    """torch.autograd.functional.hessian against differences of the gradient, and torch.func.hessian against it."""
    need_derivatives(subject)
    inputs = subject.floats()
    i = subject.wrt[0]
    if inputs[i].numel() > 64:
        raise Skip("an input of more than 64 elements")
    part = replace(subject, wrt=(i,))
    call, (x,) = weighted_sum(part, inputs)
    try:
        reverse = torch.autograd.functional.hessian(call, x)
    except CLEAR as error:
        return unsupported("second derivative", error)
    u, w = normal(x, 41), normal(x, 43)
    try:
        slope = slopes_along(
            lambda t: dot(eager(call, [x + t * u]), [w], x).reshape(1),
            x.new_zeros(()),
            x.new_ones(()),
            least_scale([x], [u]),
            magnitude(subject, inputs),
        )
    except CLEAR as error:
        return unsupported("second derivative", error)
    product = torch.einsum("i,ij,j->", u.reshape(-1), reverse.reshape(x.numel(), x.numel()), w.reshape(-1)).reshape(1)
    what = "u'Hw by torch.autograd.functional.hessian"
    found = compare(what, product, slope.value, tolerance(slope), use=slope.usable)
    if found is not None:
        return replace(found, cause=f"second derivative {found.cause or 'wrong'}")
    need_the_same_draws(part, call, (x,))
    try:
        forward = torch.func.hessian(call)(x)
    except CLEAR as error:
        return unsupported("torch.func.hessian", error)
    finite = torch.where(reverse.isfinite(), forward, reverse)  # at a kink either may be NaN
    return agree(part, "differentiated", [finite], [reverse], ("func.hessian", "autograd.functional.hessian"))


def batchable(subject: Subject) -> None:
    need_derivatives(subject)
    if subject.random:
        raise Skip("random")


@check("function", "vmap")
def vmap(subject: Subject) -> Finding | None:
    """vmap over every choice of inputs equals a loop, and so do per-sample gradients."""
    batchable(subject)
    inputs = subject.floats()
    choices = {
        tuple(i for i, x in enumerate(inputs) if isinstance(x, Tensor)),
        subject.wrt,
        *((i,) for i in subject.wrt),
    }
    refused = None
    dims: tuple[int | None, ...]
    for mapped, last in itertools.product(sorted(choices), (0, -1)):
        dims = tuple(None if i not in mapped else last if i == mapped[-1] else 0 for i in range(len(inputs)))
        stacks = [x if d is None else stacked(x, d) for x, d in zip(inputs, dims, strict=True)]
        where = f"mapped over {', '.join(subject.label(i) for i in mapped)}, the last along dimension {last}"
        samples = [one_sample(subject, [s if d is None else s.select(d, k) for s, d in zip(stacks, dims, strict=True)])
                   for k in range(3)]  # fmt: skip
        expected = [torch.stack(parts) for parts in zip(*samples, strict=True)]
        n = len(expected) - len(subject.wrt)
        names = ("vmap", "loop")
        results: Sequence[Tensor]
        try:
            results = torch.func.vmap(per_sample(subject), dims)(*stacks)
        except CLEAR as error:
            refused = refused or replace(unsupported("vmap", error), figure=f"not supported {where}")
            if not own_rule(subject.call(*subject.leaves(inputs, subject.wrt)), "vmap"):
                continue
            try:  # its rule may be right, and backward be no subject for vmap
                results = torch.func.vmap(subject.call, dims)(*stacks)
            except CLEAR as error:
                return replace(unsupported("vmap", error), verdict="error", cause="its vmap rule raises")
        found = agree(subject, where, results[:n], expected[:n], names, "vmap differs from a loop", True)
        if found is None and len(results) > n:
            found = agree(subject, where, results[n:], expected[n:], names, "per-sample gradients differ from a loop")
        if found is not None:
            return found
    return refused


def stacked(x: Tensor, dim: int) -> Tensor:
    return torch.stack([x, x * 0.75 if x.is_floating_point() else x, x], dim)


def ramp(y: Tensor) -> Tensor:
    return torch.linspace(0.6, 1.4, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)


def per_sample(subject: Subject) -> Callable[..., tuple[Tensor, ...]]:
    """(outputs, gradients) as one function that vmap can map."""

    def call(*inputs: Any) -> tuple[Tensor, ...]:
        def outputs(*xs: Tensor) -> tuple[Tensor, ...]:
            arguments = list(inputs)
            for i, x in zip(subject.wrt, xs, strict=True):
                arguments[i] = x
            return subject.call(*arguments)

        values, pullback = torch.func.vjp(outputs, *(inputs[i] for i in subject.wrt))[:2]
        return (*values, *pullback(tuple(map(ramp, values))))

    return call


def one_sample(subject: Subject, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """The same by autograd."""
    values, grads = subject.gradients(inputs, incoming=[ramp(y) for y in subject.call(*inputs)])
    return (*values, *zeros_for_none(grads, [inputs[i] for i in subject.wrt]))


@check("function", "batched gradients")
def batched_gradients(subject: Subject) -> Finding | None:
    """Several grad_outputs at once (is_grads_batched) equal one after the other."""
    batchable(subject)
    inputs = subject.floats()
    leaves = subject.leaves(inputs, subject.wrt)
    xs = [leaves[i] for i in subject.wrt]
    outputs = subject.call(*leaves)
    batches = [[normal(y, 50 + 3 * k + j) for k, y in enumerate(outputs)] for j in range(3)]
    separate = [subject.gradients(inputs, incoming=v)[1] for v in batches]
    expected = [None if parts[0] is None else torch.stack(parts) for parts in zip(*separate, strict=True)]
    try:
        together = [torch.stack(parts) for parts in zip(*batches, strict=True)]
        grads = torch.autograd.grad(outputs, xs, together, is_grads_batched=True, allow_unused=True)
    except CLEAR as error:
        return unsupported("batched gradients", error)
    return agree(subject, "batched", grads, expected, ("batched", "loop"), "batched gradients differ from a loop")


@check("function", "checkpoint")
def checkpointed(subject: Subject) -> Finding | None:
    """Under activation checkpointing the gradients are the same."""
    need_derivatives(subject)
    inputs = subject.floats()
    _, expected = subject.gradients(inputs)
    leaves = subject.leaves(inputs, subject.wrt)
    try:
        outputs = checkpoint(subject.call, *leaves, use_reentrant=False)
        grads = pull(outputs, [leaves[i] for i in subject.wrt], subject.incoming(outputs))
    except CLEAR as error:
        return unsupported("checkpointing", error)
    return agree(subject, "checkpointed", grads, expected, ("checkpointed", "plain"), "differs under checkpointing")


@check("function", "compile", slow=True)
def compiled(subject: Subject) -> Finding | None:
    """torch.compile(fullgraph=True): values and gradients equal eager ones."""
    need_derivatives(subject)
    inputs = subject.floats()
    values, expected = subject.gradients(inputs)
    torch._dynamo.reset()
    try:
        fn = torch.compile(subject.fn, backend="aot_eager", fullgraph=True)
        outputs, grads = subject.gradients(inputs, fn=fn)
    except CLEAR as error:
        return unsupported("compile(fullgraph=True)", error)
    finally:
        torch._dynamo.reset()
    names, cause = ("compiled", "eager"), "compiled differs from eager"
    return agree(subject, "compiled", outputs, values, names, cause, True) or agree(
        subject, "compiled", grads, expected, names, cause
    )


@check("function", "compile func.grad", slow=True)
def compiled_func_grad(subject: Subject) -> Finding | None:
    """Compiled torch.func.grad equals eager; under it Dynamo may differentiate forward instead of calling backward."""
    batchable(subject)
    call, xs = weighted_sum(subject, subject.floats())
    torch._dynamo.reset()
    try:
        grad = torch.func.grad(call, tuple(range(len(xs))))
        grads = torch.compile(grad, backend="aot_eager", fullgraph=True)(*xs)
    except CLEAR as error:
        return unsupported("compiled torch.func", error)
    finally:
        torch._dynamo.reset()
    expected = zeros_for_none(eager(call, xs), xs)
    return agree(
        subject,
        "by compiled func.grad",
        grads,
        expected,
        ("compiled", "eager"),
        "compiled func.grad differs from eager",
    )
