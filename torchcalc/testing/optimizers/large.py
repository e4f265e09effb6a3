"""Tensors beyond the sizes of blocks, chunks and counters: each element steps, wherever it lies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import Mismatch, parting
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, Play, gradients, parameters
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

#: Primes: no multiple of a vector's width or a block; the products are beyond 2^12 and 2^16.
PERIOD, REPEATS = 37, (283, 1789)
MATRIX = (211, 67)


@check("optimizer", "large tensors")
def large_tensors(subject: OptimizerSubject) -> Finding:
    """A tensor of 66,193 elements steps as its parts do, and no element of it stands still."""
    if subject.needs_closure:
        raise Skip("it needs a closure, whose value grows with the tensor")
    for dtype in subject.dtypes[:2]:
        for name, way in subject.each_way():
            finding = tiled(subject, dtype, name, way) if subject.elementwise else permuted(subject, dtype, name, way)
            if finding is not None:
                return finding
    how = f"{PERIOD * REPEATS[-1]:,} elements" if subject.elementwise else f"{MATRIX[0] * MATRIX[1]:,} elements"
    return Finding("large tensors", figure=how)


#: Shapes of twelve elements, and of one.
SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((12,), (3, 4), (3, 2, 2), (1, 3, 2, 2), (1, 2, 3, 1, 2), (2, 1, 3, 1, 2, 1)),
    ((1,), (), (1, 1), (1, 1, 1, 1)),
)


@check("optimizer", "dimensions")
def dimensions(subject: OptimizerSubject) -> Finding:
    """An elementwise rule is the same for vectors, matrices, filters and single numbers."""
    if not subject.elementwise or (12,) not in subject.shapes(SHAPES[0]):
        raise Skip("its steps are not elementwise")
    seen = 0
    for variant in ({}, {"weight_decay": 0.3}):
        if not all(subject.has(k) for k in variant):
            continue
        for name, way in subject.each_way():
            (p,) = parameters((SHAPES[0][0],), subject.exact)
            grads = gradients([p], 3)
            for shapes, count in zip(SHAPES, (12, 1), strict=True):
                # The first run is that of the vector, or of its first element in it.
                whole = subject.trial([p], grads, **way, **variant)
                runs: dict[tuple[int, ...], Play] = {(12,): [[x[:count] for x in row] for row in whole]}
                for shape in (s for s in subject.shapes(shapes) if s in shapes):
                    rows: Grads = [[g[:count].reshape(shape) for g in row if g is not None] for row in grads]
                    play = subject.trial([nn.Parameter(p.detach()[:count].reshape(shape))], rows, **way, **variant)
                    runs[shape] = [[x.reshape(-1) for x in row] for row in play]
                m = _odd_one(runs)
                if m is not None:
                    shape, mismatch = m
                    still = bool((mismatch.found_update == 0).all())
                    cause = f"a parameter of shape {shape} {'stands still' if still else 'steps otherwise'}"
                    how = f"{name}{f' with {variant}' if variant else ''}"
                    text = f"the same numbers in shape {shape}{how}, against other shapes: {mismatch}"
                    verdict: Any = "error" if still or subject.reference is not None else "note"
                    return Finding("dimensions", verdict, str(shape), text, cause, mismatch.details())
                seen += len(runs)
    return Finding("dimensions", figure=f"{seen} runs, of 0 to 6 dimensions")


def _odd_one(runs: dict[tuple[int, ...], Play]) -> tuple[tuple[int, ...], Mismatch] | None:
    """The shape whose run is not that of the first one; the first one's own, if it is alone."""
    shapes = list(runs)
    wrong = [(s, parting(runs[shapes[0]], runs[s])) for s in shapes[1:]]
    wrong = [(s, m) for s, m in wrong if m is not None]
    if len(wrong) > 2 and len(wrong) == len(shapes) - 1 and shapes[1] != (1,):
        m = parting(runs[shapes[1]], runs[shapes[0]])
        return (shapes[0], m) if m is not None else None
    return wrong[0] if wrong and wrong[0][1] is not None else None  # type: ignore[return-value]


def tiled(subject: OptimizerSubject, dtype: torch.dtype, name: str, way: dict[str, Any]) -> Finding | None:
    """An elementwise rule gives a tensor made of copies of a small one copies of its steps."""
    shape = subject.shapes(((PERIOD,),))[0]
    (p,) = parameters((shape,), dtype)
    grads = gradients([p], 3)
    small = subject.trial([p], grads, **way)
    for repeats in REPEATS:
        for matrix in (0, repeats, PERIOD) if repeats == REPEATS[0] else (0,):  # as many rows

            def large(x: Tensor, repeats: int = repeats, matrix: int = matrix) -> Tensor:
                copies = _copies(x, repeats)
                return copies.reshape(matrix, -1) if matrix else copies

            rows: Grads = [[large(g) for g in row if g is not None] for row in grads]
            found = subject.trial([nn.Parameter(large(p))], rows, **way)
            m = parting([[large(x) for x in row] for row in small], found)
            if m is not None:
                what = f"{repeats} copies of a tensor of {p.numel()} elements{f', as {matrix} rows' if matrix else ''}"
                finding = _finding(m, f"{what}{name} in {dtype}, against one")
                # A rule that is elementwise for vectors may take a mean over a matrix.
                return finding if not matrix or _still(m) else replace(finding, verdict="note")
    return None


def _copies(x: Tensor, count: int) -> Tensor:
    return x.detach().repeat(count, *[1] * (x.dim() - 1))


def permuted(subject: OptimizerSubject, dtype: torch.dtype, name: str, way: dict[str, Any]) -> Finding | None:
    """A rule that does not mind the order of rows in a small tensor does not mind it in a large one."""
    for shape in (subject.shapes(((5, 3),))[0], subject.shapes((MATRIX,))[0]):
        (p,) = parameters((shape,), dtype)
        grads = gradients([p], 2)
        order = torch.randperm(shape[0], generator=torch.Generator("cpu").manual_seed(4), device="cpu")
        expected = [[x[order] for x in row] for row in subject.trial([p], grads, **way)]
        mixed = subject.trial([p[order]], [[g[order] for g in row if g is not None] for row in grads], **way)
        m = parting(expected, mixed, factor=1e3 if dtype == torch.float64 else 64)
        if m is None:
            continue
        if shape[0] <= 5:
            raise Skip("its steps depend on the order of the rows")
        finding = _finding(m, f"a tensor of shape {shape} with its rows in another order{name}, in {dtype}")
        still = _still(m) or bool((m.expected_update[m.wrong] == 0).any())
        # Blocks of its own may be meant; rows that stand still in one order and move in the other are not.
        verdict: Any = "error" if still and "elements from" in finding.cause else "note"
        return Finding("large tensors", verdict, finding.figure, finding.diagnosis, finding.cause, finding.details)
    return None


def _still(m: Mismatch) -> bool:
    """Whether elements stand still that should move."""
    return bool((m.found_update[m.wrong] == 0).any())


def _finding(m: Mismatch, what: str) -> Finding:
    flat = m.wrong.flatten().nonzero().flatten()
    first, count = int(flat[0]), m.wrong.numel()
    cause = f"wrong in large tensors: {len(flat)} of {count} elements, from {first} on"
    if bool((m.found_update[m.wrong] == 0).all()):
        cause = f"elements from {first} on stand still" if len(flat) > (count - first) / 2 else "elements stand still"
    elif bool((m.expected_update[m.wrong] == 0).any() or (m.found_update[m.wrong] == 0).any()):
        cause = "elements from some place on stand still"
    return Finding("large tensors", "error", f"{len(flat)} of {count}", f"{what}: {m}", cause, m.details())
