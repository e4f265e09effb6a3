"""One rule, however it is computed: foreach, fused, differentiable and compiled steps equal the loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import Mismatch, difference, failed, parting
from torchcalc.testing.optimizers.subject import WAYS, OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, Play, clone, gradients, set_gradients
from torchcalc.testing.optimizers.variants import variants
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

SIZES: tuple[tuple[int, ...], ...] = ((64, 16), (37,), (3, 4), (), (0, 2))


@check("optimizer", "implementations")
def implementations(subject: OptimizerSubject) -> Finding:
    """foreach and fused steps equal the loop, in every precision, with gradients missing now and then."""
    loop = subject.with_reference_way()
    pinned = {w: subject.options[w] for w in WAYS if subject.options.get(w) is not None}
    others = [pinned] if pinned else [way for _, way in subject.each_way()]
    others = [way for way in others if {**loop, **way} != loop]
    if not loop or not others:
        raise Skip("its options say foreach=False" if loop else "it has neither foreach nor fused")
    compared: list[str] = []
    note: Finding | None = None
    for dtype in (d for d in subject.dtypes if d != torch.float16):
        if dtype == torch.bfloat16 and subject.is_random:
            continue
        params = [
            nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype))
            for s in subject.shapes(SIZES)
        ]
        grads = gradients(params, 5)
        if len(params) > 1:
            grads[2][1] = grads[3][0] = None
        for variant in variants(subject):
            expected = subject.trial(params, grads, **{**loop, **variant})
            for way in others:
                on = next(k for k, v in way.items() if v)
                found = subject.trial(params, grads, **{**loop, **way, **variant})
                m = parting(expected, found) or _standing(expected, found)
                if m is not None and m.rounds_singly:
                    text = f"{on}=True rounds scalars to float32 in {dtype}: {m}"
                    note = note or Finding("implementations", "note", f"{m.ratio - 1:.1g}", text, "float32 scalars")
                elif m is not None:
                    what = f"{on}=True against the loop, in {dtype}{f', {variant}' if variant else ''}"
                    return failed("implementations", what, m)
                compared.append(on)
        for way in others:
            on = next(k for k, v in way.items() if v)
            try:
                _late(subject, dtype, {**loop, **way})
            except (TypeError, RuntimeError, IndexError) as reason:
                text = f"{on}=True: a first gradient that comes late: {type(reason).__name__}: {reason}"
                return Finding("implementations", "error", "raised", text, "a late first gradient raises")
    figure = f"{', '.join(dict.fromkeys(compared))}: {len(variants(subject))} variants"
    return note or Finding("implementations", figure=figure)


def _standing(expected: Play, found: Play) -> Mismatch | None:
    """Elements that one moves and the other does not, in a precision too coarse for a tolerance to tell."""
    for i, (s, e, f) in enumerate(zip(expected[0], expected[1], found[1], strict=True)):
        moved, moves = (e != s), (f != s)
        if bool(moved.any()) and not bool(moves.any()):
            off = (e.double() - f.double()).abs()
            index = tuple(int(k) for k in torch.unravel_index(off.argmax(), off.shape))
            delta = e.double() - s.double()
            return Mismatch(1, i, index, e[index].item(), f[index].item(), 0.0, moved, delta, torch.zeros_like(delta))
    return None


def _late(subject: OptimizerSubject, dtype: torch.dtype, way: dict[str, Any]) -> None:
    params = subject.parameters(dtype)
    grads = gradients(params, 4)
    if len(params) > 1:
        grads[0][1] = grads[1][1] = None
        for variant in variants(subject):
            subject.trial(params, grads, **{**way, **variant})


@check("optimizer", "determinism")
def determinism(subject: OptimizerSubject) -> Finding:
    """Twice the same is the same to the last bit."""
    grads = gradients(subject.parameters(torch.float32), 4)
    for name, way in subject.each_way():
        plays = []
        for _ in range(3):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                plays.append(subject.trial(subject.parameters(torch.float32), grads, **way))
        for other in plays[1:]:
            m = parting(plays[0], other, factor=1e-30)
            if m is not None:
                finding = failed("determinism", f"the same again{name}", m)
                cause = "differs from run to run, with torch's generators seeded"
                return Finding("determinism", "error", finding.figure, finding.diagnosis, cause, finding.details)
    return Finding("determinism", figure="its noise at its mean, as in all checks" if subject.is_noisy else "")


def recorded(
    subject: OptimizerSubject, starts: list[Tensor], grads: list[list[Tensor]], **options: Any
) -> list[Tensor]:
    """Parameters after steps that autograd recorded, as functions of what they started from and of the gradients."""
    params = [s.clone() for s in starts]
    leaves = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = subject.make(leaves, differentiable=True, **options)
    for group in optimizer.param_groups:
        group["params"] = params
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()
    return params


@check("optimizer", "differentiable")
def differentiable(subject: OptimizerSubject) -> Finding:
    """differentiable=True steps as the loop does, and the derivative through the steps is right."""
    if "differentiable" not in subject.accepts:
        raise Skip("it has no option differentiable")
    way = subject.with_reference_way()
    try:
        subject.make(subject.parameters(), differentiable=True, **way)
    except ValueError as reason:
        raise Skip(f"it refuses differentiable=True with these options: {reason}") from reason
    params = subject.parameters()[:2]
    grads = gradients(params, 4)
    note = None
    for variant in variants(subject):
        options = {**way, **variant}
        expected = subject.trial(params, grads, **options)
        given = [[g for g in step if g is not None] for step in grads]
        ends = recorded(subject, clone(params), given, **options)
        found = [*expected[:-1], clone(ends)]
        m = parting(expected, found)
        if m is not None and parting(expected, found, factor=1e10) is not None:
            what = f"differentiable=True against the loop{f', {variant}' if variant else ''}"
            return failed("differentiable", what, m)
        note = note or m
    try:
        wrong = _derivative_error(subject, way)
    except RuntimeError as reason:
        text = f"autograd through several steps raises: {str(reason).partition(';')[0]}"
        return Finding("differentiable", "note", "backward raises", text, "backward through the steps raises")
    if wrong:
        return Finding("differentiable", "error", "derivative", wrong, "derivative through the step")
    if note is not None:
        relative = abs(note.found - note.expected) / max(abs(note.expected_update[note.index].item()), 1e-300)
        text = f"differentiable=True rounds to single precision in float64, {relative:.1g} of an update: {note}"
        return Finding("differentiable", "note", f"{relative:.1g}", text, "float32 bias correction in float64")
    return Finding("differentiable", figure="value and derivative")


def _derivative_error(subject: OptimizerSubject, way: dict[str, Any]) -> str:
    """The derivative of the end by start and gradients along a direction, against Richardson differences."""
    params = subject.parameters()[:1]
    grads = [[g for g in step if g is not None] for step in gradients(params, 3)]
    inputs = [params[0].detach().clone(), *(g for (g,) in grads)]
    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]
    weight = torch.randn(params[0].shape, generator=generator, dtype=params[0].dtype)

    def end(xs: list[Tensor]) -> Tensor:
        (p,) = recorded(subject, xs[:1], [[x] for x in xs[1:]], **way)
        return (p * weight).sum()

    live = [x.clone().requires_grad_() for x in inputs]
    analytic_parts = torch.autograd.grad(end(live), live, allow_unused=True)
    if all(part is None for part in analytic_parts):
        return "autograd finds no path through the steps"
    analytic = sum(float((a * d).sum()) for a, d in zip(analytic_parts, direction, strict=True) if a is not None)

    def slope(h: float) -> float:
        up, down = ([x + s * h * d for x, d in zip(inputs, direction, strict=True)] for s in (1, -1))
        return float(end(up).detach() - end(down).detach()) / (2 * h)

    coarse, fine = slope(1e-5), slope(5e-6)
    numeric, bar = (4 * fine - coarse) / 3, abs(fine - coarse) + 1e-9
    if abs(analytic - numeric) > 10 * bar + 1e-6 * abs(numeric):
        found = f"autograd {analytic:.9g}, numeric {numeric:.9g} ± {bar:.1g}"
        return f"d(end)/d(start, gradients) along a direction: {found}"
    return ""


@check("optimizer", "compile", slow=True)
def compiled(subject: OptimizerSubject) -> Finding:
    """A compiled step equals the eager one."""
    if subject.needs_closure:
        raise Skip("it needs a closure")
    params, others = subject.parameters(torch.float32), subject.parameters(torch.float32)
    eager, optimizer = subject.make(params), subject.make(others)
    step = torch.compile(optimizer.step)
    expected: Play = [clone(params)]
    found: Play = [clone(others)]
    grads: Grads = gradients(params, 3)
    try:
        for row in grads:
            expected += subject.play(eager, params, [row])[1:]
            set_gradients(others, row)
            step()
            found.append(clone(others))
    finally:
        torch._dynamo.reset()
    m = parting(expected, found, factor=4)
    if m is not None:
        return failed("compile", "the compiled step against the eager one", m)
    off = max(difference(a, b) for a, b in zip(expected[-1], found[-1], strict=True))
    return Finding("compile", figure=f"off by at most {off:.1g}")
