"""Tensors beyond the sizes of blocks, chunks and counters: each element steps, wherever it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import Mismatch, parting
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, Play, gradients, parameters
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

#: Primes: no multiple of a vector's width or a block; the products are beyond 2^12 and 2^16.
PERIOD, REPEATS = 37, (113, 1789)
MATRIX = (211, 67)


@check("optimizer", "large tensors")
def large_tensors(subject: OptimizerSubject) -> Finding:
    """A tensor of 66,193 elements steps as its parts do, and no element of it stands still."""
    if subject.needs_closure:
        raise Skip("it needs a closure, whose value grows with the tensor")
    for dtype in (torch.float64, torch.float32):
        for name, way in subject.each_way():
            finding = tiled(subject, dtype, name, way) if subject.elementwise else permuted(subject, dtype, name, way)
            if finding is not None:
                return finding
    how = f"{PERIOD * REPEATS[-1]:,} elements" if subject.elementwise else f"{MATRIX[0] * MATRIX[1]:,} elements"
    return Finding("large tensors", figure=how)


def tiled(subject: OptimizerSubject, dtype: torch.dtype, name: str, way: dict[str, Any]) -> Finding | None:
    """An elementwise rule gives a tensor made of copies of a small one copies of its steps."""
    shape = subject.shapes(((PERIOD,),))[0]
    (p,) = parameters((shape,), dtype)
    grads = gradients([p], 3)
    small = subject.trial([p], grads, **way)
    for repeats in REPEATS:
        big = nn.Parameter(_copies(p, repeats))
        rows: Grads = [[_copies(g, repeats) for g in row if g is not None] for row in grads]
        found = subject.trial([big], rows, **way)
        expected: Play = [[_copies(x, repeats) for x in row] for row in small]
        m = parting(expected, found)
        if m is not None:
            return _finding(m, f"{repeats} copies of a tensor of {p.numel()} elements{name} in {dtype}, against one")
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
        still = bool((m.found_update[m.wrong] == 0).any() or (m.expected_update[m.wrong] == 0).any())
        # Blocks of its own may be meant; rows that stand still in one order and move in the other are not.
        verdict: Any = "error" if still and "elements from" in finding.cause else "note"
        return Finding("large tensors", verdict, finding.figure, finding.diagnosis, finding.cause, finding.details)
    return None


def _finding(m: Mismatch, what: str) -> Finding:
    flat = m.wrong.flatten().nonzero().flatten()
    first, count = int(flat[0]), m.wrong.numel()
    cause = f"wrong in large tensors: {len(flat)} of {count} elements, from {first} on"
    if bool((m.found_update[m.wrong] == 0).all()):
        cause = f"elements from {first} on stand still" if len(flat) > (count - first) / 2 else "elements stand still"
    elif bool((m.expected_update[m.wrong] == 0).any() or (m.found_update[m.wrong] == 0).any()):
        cause = "elements from some place on stand still"
    return Finding("large tensors", "error", f"{len(flat)} of {count}", f"{what}: {m}", cause, m.details())
