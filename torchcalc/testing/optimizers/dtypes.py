"""Precisions, complex and sparse tensors, empty and 0-d parameters, and whether a bfloat16 weight moves at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchcalc.testing.optimizers.compare import difference, failed, parting, pattern
from torchcalc.testing.optimizers.groups import alone, column, independent
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, clone, gradients, parameters, set_gradients
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

SIZES = ((1029,), (37,), (1,))  # vectorised loops, and their tails


@check("optimizer", "precisions")
def precisions(subject: OptimizerSubject) -> Finding:
    """In float32, bfloat16 and float16 the first steps are those in float64, to the rounding of the format."""
    figures = []
    for dtype in (d for d in (torch.float32, torch.bfloat16, torch.float16) if d in subject.dtypes):
        for name, way in subject.each_way():
            if dtype == torch.float16 and not independent(subject, way):
                continue  # a clipped gradient may be small; see the check float16 range
            generator = torch.Generator().manual_seed(0)
            wide = [
                torch.randn(s, generator=generator, dtype=torch.float64).clamp(-3, 3).to(dtype).to(subject.exact)
                for s in subject.shapes(SIZES)
            ]
            wide = [w * 1e-2 if subject.has_lr and subject.lr < 0.1 else w for w in wide]
            wide = [w.to(dtype).to(subject.exact) for w in wide]
            params = [nn.Parameter(w.to(dtype)) for w in wide]
            # Not small ones: float16 would lose their squares, which is another check's concern.
            grads: Grads = [[g + 0.5 * g.sign() for g in gradients(params, 1)[0] if g is not None]]
            found = subject.trial(params, grads, **way)
            exact: Grads = [[g.to(subject.exact) for g in step if g is not None] for step in grads]
            expected = subject.trial([nn.Parameter(w) for w in wide], exact, **subject.with_reference_way())
            for e, f, s in zip(expected[1], found[1], wide, strict=True):
                moves = (e - s).abs() > 4 * torch.finfo(dtype).eps * s.abs()
                still = moves & (f.to(s.dtype) == s)
                if bool(still.any()):
                    m = parting([[s], [e]], [[s], [f.to(s.dtype)]])
                    text = f"{dtype}{name}: {int(still.sum())} of {still.numel()} elements stay, in float64 they move"
                    assert m is not None
                    cause = pattern(m) or "elements unchanged"
                    verdict: Any = "error" if subject.elementwise or bool(still.all()) else "note"
                    return Finding("precisions", verdict, f"{int(still.sum())} unchanged", text, cause, m.details())
            m = parting([[x.to(dtype) for x in row] for row in expected], found)
            if m is not None:
                return failed("precisions", f"{dtype}{name} against float64", m)
            figures.append(str(dtype).removeprefix("torch."))
    return Finding("precisions", figure=", ".join(dict.fromkeys(figures)))


@check("optimizer", "mixed dtypes")
def mixed_dtypes(subject: OptimizerSubject) -> Finding:
    """Parameters of several dtypes in one group step each as alone."""
    if subject.needs_closure or not independent(subject, {}):
        raise Skip("its parameters are coupled, or it needs a closure")
    kinds = [d for d in (torch.float64, torch.float32, torch.bfloat16) if d in subject.dtypes]
    if len(kinds) < 2 or (subject.is_random and kinds.pop() and len(kinds) < 2):
        raise Skip("it takes one dtype only")
    shape = subject.shapes(((3, 4),))[0]
    for order in (kinds, kinds[::-1]):
        params = [parameters((shape,), d, seed=k)[0] for k, d in enumerate(order)]
        grads = gradients(params, 3)
        for name, way in subject.each_way():
            try:
                found = subject.trial(params, grads, **way)
            except (RuntimeError, TypeError, ValueError) as reason:
                text = f"parameters of {', '.join(map(str, order))} in one group{name}: {reason}"
                return Finding("mixed dtypes", "note", "refused", text, "refuses mixed dtypes")
            for i, dtype in enumerate(order):
                m = parting(alone(subject, way, params, grads, i), column(found, i))
                if m is not None:
                    what = f"a parameter of {dtype} beside those of {', '.join(map(str, order))}{name}"
                    finding = failed("mixed dtypes", what, m)
                    return replace(finding, cause=finding.cause or f"{dtype} computed as another dtype")
    return Finding("mixed dtypes", figure=", ".join(str(d).removeprefix("torch.") for d in kinds))


@check("optimizer", "float16 range")
def float16_range(subject: OptimizerSubject) -> Finding | None:
    """A small float16 gradient, whose square float16 cannot hold, does not make the weight inf or nan."""
    if torch.float16 not in subject.dtypes:
        raise Skip("it refuses float16")
    for name, way in subject.each_way():
        for size in (1e-2, 1e-4):
            p = nn.Parameter(torch.ones(subject.shapes(((8,),))[0], dtype=torch.float16))
            try:
                (_, end) = subject.trial([p], [[torch.full_like(p, size)]], **way)
            except RuntimeError as reason:
                text = f"a float16 gradient of {size:g}{name} raises: {reason}"
                return Finding("float16 range", "note", f"g = {size:g}", text, "a float16 step overflows")
            if not bool(end[0].isfinite().all()):
                end_value = float(end[0].flatten()[0])
                text = f"a float16 gradient of {size:g}{name} makes a weight of 1 {end_value}: its square is 0"
                return Finding("float16 range", "note", f"g = {size:g}", text, "square of a float16 gradient is 0")
    return None


@check("optimizer", "bfloat16 progress")
def bfloat16_progress(subject: OptimizerSubject) -> Finding:
    """A bfloat16 weight follows its float32 twin over many small steps."""
    if not {torch.float32, torch.bfloat16} <= set(subject.dtypes):
        raise Skip("it refuses bfloat16, or float32")
    shape = subject.shapes(((8,),))[0]
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.ones(shape, dtype=dtype))
        optimizer = subject.make([p])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for _ in range(100):
                subject.step(optimizer, [p], [torch.ones_like(p)])
        ends.append(float(p.detach().float().mean()))
    wide, narrow = ends
    if abs(wide - 1) < 2**-6:
        raise Skip(f"its 100 steps are too short to tell: 1 becomes {wide:.4g} in float32")
    share = (narrow - 1) / (wide - 1)
    if share < 0.5:
        text = f"100 steps by a gradient of 1 take a weight of 1 to {wide:.4g} in float32, to {narrow:.4g} in bfloat16"
        return Finding("bfloat16 progress", "note", f"{share:.0%} of the way", text, "bfloat16 weights stall")
    return Finding("bfloat16 progress", figure=f"{share:.0%} of the way of float32")


@check("optimizer", "complex")
def complex_parameters(subject: OptimizerSubject) -> Finding:
    """Complex parameters step as pairs of real ones."""
    for name, way in subject.each_way():
        params = subject.parameters(torch.complex128)
        grads = gradients(params, 3)
        pairs = [nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
        try:
            found = subject.trial(params, grads, **way)
        except Exception as reason:
            raise Skip(f"it refuses complex parameters{name}: {reason}") from reason
        try:
            real = subject.trial(
                pairs, [[None if g is None else torch.view_as_real(g) for g in step] for step in grads], **way
            )
        except ValueError as reason:
            raise Skip(f"it does not take the shape of the pairs: {reason}") from reason
        m = parting([[torch.view_as_complex(x) for x in row] for row in real], found)
        if m is not None and any(not bool(x.isfinite().all()) for x in found[-1]):
            return failed("complex", f"complex{name} against pairs", m)
        if m is not None:
            text = f"complex numbers{name} are not treated as pairs of real ones: {m}"
            return Finding("complex", "note", "not pairs", text, "complex numbers not treated as pairs")
    return Finding("complex", figure="as pairs of real numbers")


@check("optimizer", "sparse")
def sparse_gradients(subject: OptimizerSubject) -> Finding | None:
    """Sparse gradients, with duplicate indices, step as dense ones, or leave absent rows alone; or they are refused."""
    if subject.needs_closure:
        raise Skip("its gradients come from a closure")
    for name, way in subject.each_way():
        start = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=subject.exact)
        dense_p, p = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        dense, optimizer = subject.make([dense_p], **way), subject.make([p], **way)
        rows = torch.tensor([[1, 4, 1]])
        values = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=subject.exact)
        absent = torch.tensor([0, 2, 3, 5])
        for step in range(3):
            g = torch.sparse_coo_tensor(rows, values, (6, 3))
            p.grad = g
            before = clone([p])
            try:
                optimizer.step()
            except Exception as reason:
                if difference(before[0], p):
                    text = f"sparse gradients are refused{name}, but the parameter has changed: {reason}"
                    return Finding("sparse", "error", "changed", text, "changed before it raised")
                raise Skip(f"it refuses sparse gradients{name}: {reason}") from reason
            set_gradients([dense_p], [g.to_dense()])
            dense.step()
            lazy = difference(before[0][absent], p[absent]) == 0
            want = dense_p.detach().clone()
            if lazy:
                want[absent] = before[0][absent]
                if step > 0 and difference(start[absent], dense_p[absent]):
                    break  # lazy updates differ from dense ones from here on, by design
            m = parting([before, [want]], [before, [p.detach()]])
            if m is not None:
                finding = failed("sparse", f"sparse against dense gradients{name}, step {step + 1}", m)
                twice = m.wrong.any(1).nonzero().flatten().tolist() == [1]
                cause = "duplicate indices not summed first" if twice else finding.cause
                return Finding("sparse", "error", finding.figure, finding.diagnosis, cause, finding.details)
    return None


@check("optimizer", "shapes")
def odd_shapes(subject: OptimizerSubject) -> Finding:
    """Empty and 0-d parameters step, alone and among others."""
    shapes = subject.shapes(((), (0,), (1,), (2, 0), (3,)))
    params = [nn.Parameter(torch.ones(s, dtype=subject.exact)) for s in shapes]
    if not any(not p.dim() or not p.numel() for p in params):
        raise Skip("it refuses them")
    grads = gradients(params, 3)
    for name, way in subject.each_way():
        try:
            together = subject.trial(params, grads, **way)
        except Exception as reason:  # loud, and never a wrong number
            text = f"a step with parameters of shapes {shapes}{name} raises {type(reason).__name__}: {reason}"
            return Finding("shapes", "note", "refused", text, f"raises {type(reason).__name__}")
        for i, p in enumerate(params):
            if p.numel():
                column: Any = [[g] for g in (step[i] for step in grads)]
                m = parting(subject.trial([p], column, **way), [[row[i]] for row in together])
                if m is not None and independent(subject, way):
                    return failed("shapes", f"a parameter of shape {tuple(p.shape)} among empty ones{name}", m)
    return Finding("shapes", figure=", ".join(str(s) for s in shapes))
