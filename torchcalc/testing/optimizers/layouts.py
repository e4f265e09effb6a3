"""Memory: strides of parameter, gradient and state may differ; a view's neighbours are not its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import Mismatch, difference, failed, parting
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Play, clone, gradients
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

#: Large enough for vectorised loops and their tails.
BIG = ((2, 3, 5, 7), (4, 16, 3, 3))
MATRICES = ((13, 37), (5, 9))


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else transposed(x)


def transposed(x: Tensor) -> Tensor:
    """The same values, dense, with the last two dimensions swapped in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def strided(x: Tensor) -> Tensor:
    """The same values with holes between them, and not all of them dense."""
    wide = torch.zeros((*x.shape, 2), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def starting(subject: OptimizerSubject) -> list[nn.Parameter]:
    """Parameters of at least two dimensions."""
    generator = torch.Generator().manual_seed(0)
    shapes = subject.shapes(BIG)
    shapes = shapes if all(len(s) > 1 for s in shapes) and shapes[0] in BIG else subject.shapes(MATRICES)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=subject.exact)) for s in shapes if len(s) > 1]


def run(
    subject: OptimizerSubject,
    of_p: Callable[[Tensor], Tensor],
    of_g: Callable[[Tensor], Tensor],
    change_to: Callable[[Tensor], Tensor] | None,
    dtype: torch.dtype,
    way: dict[str, Any],
) -> Play:
    """Steps with parameters and gradients of these layouts; half way the parameters' layout changes, as .to() does."""
    params = [nn.Parameter(of_p(p.detach().to(dtype))) for p in starting(subject)]
    optimizer = subject.make(params, **way)
    seen = [clone(params)]
    for t, step in enumerate(gradients(params, 4)):
        if t == 2 and change_to is not None:
            for p in params:
                p.data = change_to(p.data)
        if subject.needs_closure:
            subject.step(optimizer, params, [of_g(g) for g in step if g is not None])
        else:
            for p, g in zip(params, step, strict=True):
                assert g is not None
                p.grad = of_g(g)
            optimizer.step()
        seen.append(clone(params))
    return seen


@check("optimizer", "layouts")
def layouts(subject: OptimizerSubject) -> Finding:
    """Parameter, gradient and state of different memory formats step as contiguous ones."""
    if not starting(subject):
        raise Skip("it takes no parameters of two dimensions")
    cases: tuple[tuple[str, Any, Any, Any], ...] = (
        ("channels_last parameters", channels_last, channels_last, None),
        ("channels_last parameters with contiguous gradients", channels_last, contiguous, None),
        ("contiguous parameters with transposed gradients", contiguous, transposed, None),
        ("parameters moved to channels_last after 2 steps, state contiguous", contiguous, channels_last, channels_last),
        ("contiguous parameters with strided gradients", contiguous, strided, None),
        ("strided parameters", strided, contiguous, None),
    )
    for dtype in subject.dtypes[:2]:
        for name, way in subject.each_way():
            expected = run(subject, contiguous, contiguous, None, dtype, way)
            for what, of_p, of_g, change_to in cases:
                m = parting(expected, run(subject, of_p, of_g, change_to, dtype, way), factor=4)
                if m is not None:
                    finding = failed("layouts", f"{what}{name} in {dtype}", m)
                    cause = "strides ignored: elements paired by memory, not by index" if _paired(m) else finding.cause
                    return Finding("layouts", "error", finding.figure, finding.diagnosis, cause, finding.details)
    return Finding("layouts", figure=f"{len(cases)} combinations")


def _paired(m: Mismatch) -> bool:
    """Whether the updates have the right size and are at the wrong places."""
    if not bool(m.found_update.isfinite().all()):
        return False
    e, f = float(m.expected_update.norm()), float(m.found_update.norm())
    return 0.1 * e < f < 10 * e and float(m.wrong.double().mean()) > 0.1 and m.constant_ratio is None


@check("optimizer", "views")
def views(subject: OptimizerSubject) -> Finding | None:
    """A parameter that is a strided view of a larger buffer steps, and its neighbours in the buffer stay."""
    shape = subject.shapes(((6, 8),))[0]
    for dtype in subject.dtypes[:2]:
        for name, way in subject.each_way():
            generator = torch.Generator().manual_seed(3)
            full = torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator, dtype=torch.float64).to(dtype)
            buffer, before = full.clone(), full.clone()
            p = nn.Parameter(buffer[..., ::2])
            plain = nn.Parameter(full[..., ::2].contiguous())
            if p.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
                raise Skip("a Parameter copies here")
            grads = gradients([plain], 3)
            found = subject.play(subject.make([p], **way), [p], grads)
            off = difference(before[..., 1::2], buffer[..., 1::2])
            if off:
                changed = int((before[..., 1::2] != buffer[..., 1::2]).sum())
                text = f"{changed} elements beside a strided view changed{name} in {dtype}, by up to {off:.3g}"
                return Finding("views", "error", f"{off:.2g}", text, "neighbours of a view overwritten")
            m = parting(subject.play(subject.make([plain], **way), [plain], grads), found, factor=4)
            if m is not None:
                return failed("views", f"a strided view{name} in {dtype} against a contiguous parameter", m)
    return None


@check("optimizer", "expanded gradients")
def expanded_gradients(subject: OptimizerSubject) -> Finding | None:
    """Gradients whose elements share memory, such as those of p.sum(), step as others."""
    if subject.needs_closure:
        raise Skip("its gradients come from a closure")
    for name, way in subject.each_way():
        params, others = subject.parameters(), subject.parameters()
        expected, found = [clone(params)], [clone(others)]
        one, two = subject.make(params, **way), subject.make(others, **way)
        for t in range(3):
            for p, q in zip(params, others, strict=True):
                p.grad = torch.full_like(p, t - 0.5)
                q.grad = torch.tensor(t - 0.5, dtype=q.dtype).expand_as(q)
            one.step()
            two.step()
            expected.append(clone(params))
            found.append(clone(others))
        m = parting(expected, found)
        if m is not None:
            finding = failed("expanded gradients", f"expanded gradients{name}", m)
            cause = "strides of the gradient ignored"
            return Finding("expanded gradients", "error", finding.figure, finding.diagnosis, cause, finding.details)
    return None
