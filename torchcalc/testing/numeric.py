"""J'v against differences: what the checks of first derivatives have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import compare, regions
from torchcalc.testing.differences import Slopes, element_slopes, least_scale, slopes_along
from torchcalc.testing.registry import Skip
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, dot, normal, said

MOST = 24  # elements of an input that get a difference of their own; a dense direction covers the others
Inputs = Sequence[Any]
Scalar = Callable[..., Tensor]


def flat(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([y.reshape(-1) for y in outputs])


def replaced(inputs: Inputs, i: int, x: Any) -> list[Any]:
    return [*inputs[:i], x, *inputs[i + 1 :]]


def of_input(subject: Subject, inputs: Inputs, i: int, fn: Any = None) -> Callable[[Tensor], Tensor]:
    """The outputs, as one vector, as a function of input i alone."""

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            return flat(subject.call(*inputs[:i], x, *inputs[i + 1 :], fn=fn))

    return f


def chosen(x: Tensor) -> list[int]:
    """Flat indices of at most MOST elements."""
    n = x.numel()
    if n <= MOST:
        return list(range(n))
    order = torch.randperm(n, generator=torch.Generator("cpu").manual_seed(3), device="cpu")
    return list(order[:MOST].tolist())


def spread_out(slopes: Slopes, x: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(value, allowed, use) in the shape of x, from the slopes of some of its elements."""
    value = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
    use = torch.zeros(x.numel(), dtype=torch.bool, device="cpu")
    allowed = torch.ones_like(value)
    value[indices] = slopes.value.to(x.dtype)
    allowed[indices] = tolerance(slopes).to(x.dtype)
    use[indices] = slopes.usable.cpu()
    return value.reshape(x.shape), allowed.reshape(x.shape), use.to(x.device).reshape(x.shape)


def tolerance(slopes: Slopes) -> Tensor:
    """Ten error bars, and the rounding of the analytic value."""
    eps = torch.finfo(slopes.value.dtype).eps
    size = slopes.value.nan_to_num(0, 0, 0).abs()
    return 10 * slopes.error + 1e4 * eps * (size + size.max() if size.numel() else size)


def telling(value: Tensor, allowed: Tensor, use: Tensor, size: float) -> Tensor:
    """Where a difference is exact enough to tell a wrong gradient: to a hundredth of it, or of what f changes by at all.

    Args:
        value, allowed, use: as of :func:`spread_out`.
        size: of the function, Σ|v·f|.
    """
    largest = float(value[use].abs().max()) if use.any() else 0.0
    floor = max(1e-3 * largest, torch.finfo(value.dtype).eps ** (1 / 3) * size)
    return use & (allowed <= 0.01 * value.abs().clamp(min=floor) + torch.finfo(value.dtype).tiny)


def left_out(subject: Subject, i: int, x: Tensor, slopes: Slopes, indices: Sequence[int]) -> str:
    """The kinks, by name."""
    names = []
    for k, kink, left, right in zip(indices, slopes.kink, slopes.left, slopes.right, strict=True):
        if kink:
            index = [int(j) for j in torch.unravel_index(torch.tensor(k, device="cpu"), x.shape)]
            names.append(f"{subject.label(i)} {index} = {x.reshape(-1)[k].item():.4g} ({left:.3g} | {right:.3g})")
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"; kinks left out: {', '.join(names[:3])}{more}" if names else ""


def need_derivatives(subject: Subject) -> None:
    if not subject.wrt:
        raise Skip("no input is differentiable")


def weighted_sum(subject: Subject, inputs: Sequence[Any]) -> tuple[Scalar, tuple[Tensor, ...]]:
    """<v, f> as a function of the differentiable inputs, and these; smooth and nonlinear in the outputs."""
    weights = subject.incoming(subject.call(*inputs))

    def call(*xs: Tensor) -> Tensor:
        arguments = list(inputs)
        for i, x in zip(subject.wrt, xs, strict=True):
            arguments[i] = x
        return dot(subject.call(*arguments), weights, xs[0])

    return call, tuple(inputs[i] for i in subject.wrt)


def need_the_same_draws(subject: Subject, call: Scalar, xs: Sequence[Tensor]) -> None:
    """A mask is drawn in the order in which its input lies, and under torch.func that may be another than under autograd."""
    if not subject.random:
        return
    try:
        values = [torch.func.vjp(call, *xs)[0], torch.func.jvp(call, tuple(xs), tuple(map(torch.zeros_like, xs)))[0]]
    except CLEAR:
        return  # what follows says so
    if not all(torch.allclose(value, call(*xs), rtol=1e-6) for value in values):
        raise Skip("torch.func draws other random numbers")


def quick(subject: Subject, inputs: Inputs, where: str = "") -> Finding:
    """J'v against differences along one direction of all inputs; element by element where that fails or has a kink."""
    need_derivatives(subject)
    shapes, grads = subject.gradients(inputs)
    u = [normal(inputs[i], 11 + i) * inputs[i].abs().clamp(min=1) for i in subject.wrt]
    slopes = along_all(subject, inputs, u)
    if bool(slopes.usable.all()):
        weights = flat(subject.incoming(shapes)).to(slopes.value.dtype)
        actual, expected, allowed = dot(grads, u, u[0]), weights @ slopes.value, weights.abs() @ tolerance(slopes)
        size = float(weights.abs() @ flat(shapes).abs().to(weights.dtype))
        exact = telling(expected, allowed, torch.ones_like(expected, dtype=torch.bool), size)
        if bool(exact) and abs(float(actual - expected)) <= float(allowed):
            return Finding("", figure="along a direction")
    return first_order(subject, inputs, where)


def first_order(subject: Subject, inputs: Inputs, where: str = "") -> Finding:
    """J'v of every input against differences, element by element; "not checked" if none of them is exact enough."""
    need_derivatives(subject)
    shapes, grads = subject.gradients(inputs)
    dead = not all(y.isfinite().all() for y in shapes)
    incoming = [torch.where(y.isfinite(), v, 0) for y, v in zip(shapes, subject.incoming(shapes), strict=True)]
    if dead:  # outside of its domain, whose gradients say nothing
        _, grads = subject.gradients(inputs, incoming=incoming)
    weights, excess, kinks = flat(incoming).to(subject.exact), 0.0, ""
    size = float((weights * flat(shapes).nan_to_num(0, 0, 0)).abs().sum())
    compared = total = 0
    for n, i in enumerate(subject.wrt):
        x = inputs[i]
        if not x.numel():
            continue
        indices = chosen(x)
        slopes = element_slopes(of_input(subject, inputs, i), x, weights, indices, floor(subject, inputs))
        value, allowed, use = spread_out(slopes, x, indices)
        if dead:
            use = use & zeros_like_none(grads[n], x).isfinite()
        kinks += left_out(subject, i, x, slopes, indices)
        what = f"gradient of {subject.label(i)}{where}"
        areas = regions(x, special_rows(subject, inputs))
        found = compare(what, grads[n], value, allowed, use=use, regions=areas)
        if found is not None and found.verdict == "error":
            others = mistaken(subject, inputs, i, weights)
            found = compare(what, grads[n], value, allowed, use=use, regions=areas, alternatives=others)
        if found is not None:
            cause = f"None returned for {subject.label(i)}" if found.cause == "None returned" else found.cause
            return replace(found, cause=cause)
        exact = telling(value, allowed, use, size)
        compared, total = compared + int(exact.sum()), total + len(indices)
        gap = ((zeros_like_none(grads[n], x) - value).abs() / allowed)[use]
        excess = max(excess, float(gap.max()) if gap.numel() else 0.0)
        if len(indices) < x.numel():
            found = dense(subject, inputs, i, grads[n], weights)
            if found is not None:
                return found
    counts = f"{compared} of {total} elements"
    details = dict(compared=compared, elements=total)
    if total and not compared:
        text = (
            f"{counts} compared{where}: no difference is exact enough to tell a right gradient from a wrong one{kinks}"
        )
        return Finding("", "not checked", counts, text, details=details)
    return Finding("", figure=f"{counts}, {excess:.2f} of the error bar{kinks}", details=details)


def mistaken(subject: Subject, inputs: Inputs, i: int, weights: Tensor) -> dict[str, Tensor]:
    """Named gradients that a wrong one may equal: for another grad_output, of another input."""
    incoming = subject.incoming(subject.call(*inputs))
    found = {}
    for name, change in (("ignored", torch.ones_like), ("averaged", lambda v: v.mean().expand_as(v).contiguous())):
        changed = [change(v) for v in incoming]
        _, (grad,) = subject.gradients(inputs, (i,), incoming=changed)
        if (
            grad is not None
            and grad.any()
            and not all(torch.equal(c, v) for c, v in zip(changed, incoming, strict=True))
        ):
            found[f"grad_output {name}"] = grad
    for j in subject.wrt:
        if j != i and inputs[j].shape == inputs[i].shape and inputs[j].numel() <= MOST:
            slopes = element_slopes(of_input(subject, inputs, j), inputs[j], weights)
            found[f"gradient of {subject.label(j)} returned for {subject.label(i)}"] = slopes.value.reshape(
                inputs[j].shape
            )
    return found


def zeros_like_none(grad: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if grad is None else grad


def special_rows(subject: Subject, inputs: Inputs) -> dict[str, Tensor]:
    """Rows that a class target singles out."""
    ignore, rows = subject.option("ignore_index"), {}
    for x in inputs:
        if isinstance(x, Tensor) and x.dim() == 1 and x.dtype == torch.int64:
            if ignore is not None:
                rows["rows equal to ignore_index"] = x == ignore
                rows["rows not equal to ignore_index"] = x != ignore
            rows["rows of class 0"] = x == 0
    return rows


def dense(subject: Subject, inputs: Inputs, i: int, grad: Tensor | None, weights: Tensor) -> Finding | None:
    """The elements that have no difference of their own: all at once, along a direction."""
    x = inputs[i]
    u = normal(x, 11) * x.abs().clamp(min=1)
    slopes = slopes_along(of_input(subject, inputs, i), x, u)
    live = weights * slopes.usable
    reached = slopes.usable | (weights == 0)
    if not reached.all():
        return None  # a kink on the way of some output; the sampled elements have been compared
    value, allowed = (live * slopes.value.nan_to_num(0)).sum(), (live.abs() * tolerance(slopes)).sum()
    actual = torch.zeros_like(value) if grad is None else (grad * u).sum()
    return compare(f"gradient of {subject.label(i)} along a direction", actual, value, allowed)


def slack(subject: Subject, *values: Tensor) -> float:
    """What two ways to compute the same may differ by: rounding, relative to the largest number."""
    size = max((float(v.nan_to_num(0, 0, 0).abs().max()) for v in values if v.numel()), default=0.0)
    return 1e4 * torch.finfo(subject.exact).eps * max(size, 1.0)  # incoming gradients are near 1


def magnitude(subject: Subject, inputs: Inputs) -> float:
    """Σ|v·y|: ε of it is about the rounding error of <J'v, w>, also where the outputs are flat and J'v is next to 0."""
    with torch.no_grad():
        outputs = subject.call(*inputs)
    return sum(
        float((y * v).nan_to_num(0, 0, 0).abs().sum()) for y, v in zip(outputs, subject.incoming(outputs), strict=True)
    )


def floor(subject: Subject, inputs: Inputs) -> float:
    """What ε is relative to at least in an output's rounding: one next to 0 may be what is left of larger numbers."""
    sizes = [float(inputs[i].nan_to_num(0, 0, 0).abs().max()) for i in subject.wrt if inputs[i].numel()]
    return max(sizes, default=1.0)


def directions(subject: Subject, inputs: Inputs) -> list[Tensor]:
    return [normal(inputs[i], 11 + i) for i in subject.wrt]


def along_all(subject: Subject, inputs: Inputs, u: Sequence[Tensor]) -> Slopes:
    """Ju of all outputs by differences, along one direction of all inputs together."""

    def f(t: Tensor) -> Tensor:
        moved = list(inputs)
        for i, direction in zip(subject.wrt, u, strict=True):
            moved[i] = inputs[i] + t * direction
        with torch.no_grad():
            return flat(subject.call(*moved))

    zero = torch.zeros((), dtype=subject.exact, device=u[0].device)
    scale = least_scale([inputs[i] for i in subject.wrt], u)
    return slopes_along(f, zero, torch.ones_like(zero), scale, floor(subject, inputs))


def unsupported(what: str, error: Exception) -> Finding:
    """What a subject does not claim, and refuses clearly, is a note."""
    text = said(error)
    return Finding("", "note", "not supported", text, f"no {what}")
