"""Two runs compared: where they part first, by how much, and what the pattern of the difference says.

The tolerance is derived: a step of an optimizer is a few roundings per element, each at most half an ulp of the largest
number involved, and they add up over the steps: (8 + 4·step)·ε·max|p|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.optimizers.tensors import Play
from torchcalc.testing.report import Finding

__all__ = ["Mismatch", "difference", "failed", "parting", "pattern", "same", "tree_difference"]


@dataclass(frozen=True)
class Mismatch:
    """The worst element of the first step after which two runs differ."""

    step: int  # from 1; 0 if they start differently
    parameter: int
    index: tuple[int, ...]
    expected: float | complex
    found: float | complex
    allowed: float
    wrong: Tensor  # which elements of the parameter
    expected_update: Tensor
    found_update: Tensor

    @property
    def ratio(self) -> float:
        """Found over expected update at the worst element."""
        e, f = self.expected_update[self.index], self.found_update[self.index]
        if not bool(e):
            return math.nan
        return float(f.abs() / e.abs()) if e.is_complex() else float(f / e)

    @property
    def constant_ratio(self) -> float | None:
        """Found over expected update, if it is one number for all elements of the parameter."""
        e, f = self.expected_update, self.found_update
        if e.is_complex() or not e.numel() or not bool((e != 0).all()) or not bool(f.isfinite().all()):
            return None
        ratios = f / e
        slack = 1e-6 + self.allowed / float(e.abs().min())
        spread = float(ratios.max() - ratios.min()) / max(float(ratios.abs().max()), 1e-300)
        return float(ratios.median()) if spread <= slack else None

    @property
    def rounds_singly(self) -> bool:
        """Whether float64 updates differ by no more than float32 rounds."""
        off = (self.found_update - self.expected_update).abs().max()
        return self.allowed < 1e-10 and bool(off <= 1e-6 * self.expected_update.abs().max())

    def __str__(self) -> str:
        where = f"after step {self.step}" if self.step else "before the first step"
        text = (
            f"{where}, parameter {self.parameter} of shape {tuple(self.wrong.shape)}, element {self.index}: "
            f"expected {self.expected:.9g}, found {self.found:.9g} "
            f"(off by {abs(self.expected - self.found):.2g}, {self.allowed:.2g} allowed); "
            f"{int(self.wrong.sum())} of {self.wrong.numel()} elements are wrong"
        )
        if math.isfinite(self.ratio):
            text += f"; the step's update there is {self.ratio:.6g} of the expected one"
        return text

    def details(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "parameter": self.parameter,
            "index": list(self.index),
            "expected": self.expected,
            "found": self.found,
            "ratio": self.ratio,
            "allowed": self.allowed,
            "wrong_elements": int(self.wrong.sum()),
        }


def parting(expected: Play, found: Play, factor: float = 1.0, each: bool = False) -> Mismatch | None:
    """Where two runs part; None if they agree to rounding, in the coarser of their dtypes.

    Args:
        expected, found: the runs.
        factor: how many times the rounding that is derived may be reached.
        each: judge each element by the length of its own way; by default by the largest element of its parameter.
    """
    assert len(expected) == len(found)
    sizes: list[Any] = [0.0] * len(expected[0])
    for t in range(len(expected)):
        worst, place = 1.0, None
        for i, (x, y) in enumerate(zip(expected[t], found[t], strict=True)):
            if not x.numel():
                continue
            epsilon = max(torch.finfo(x.dtype).eps, torch.finfo(y.dtype).eps)
            if each:
                gone = _wide(x) - _wide(expected[t - 1][i]) if t else _wide(x)
                sizes[i] = sizes[i] + gone.abs().nan_to_num(0.0, 0.0, 0.0)
            else:
                sizes[i] = max(sizes[i], float(x.abs().max().nan_to_num(0.0, 0.0, 0.0)))
            least = 1e-300 if each else 1e-30
            allowed = factor * (8 + 4 * t) * epsilon * (sizes[i] + least if each else max(sizes[i], least))
            off = _distance(x, y) / allowed
            if float(off.max()) > worst:
                worst, place = float(off.max()), (i, allowed, off)
        if place is not None:
            i, allowed, off = place
            x, y = _wide(expected[t][i]), _wide(found[t][i])
            index = tuple(int(k) for k in torch.unravel_index(off.argmax(), off.shape))
            before, before_found = _wide(expected[max(t - 1, 0)][i]), _wide(found[max(t - 1, 0)][i])
            most = float(allowed[index]) if isinstance(allowed, Tensor) else allowed
            return Mismatch(t, i, index, x[index].item(), y[index].item(), most, off > 1, x - before, y - before_found)
    return None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """|x − y|; 0 where both are the same inf or nan, inf where only one is."""
    x, y = _wide(x), _wide(y)
    off = (x - y).abs()
    off = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, off)
    return off.nan_to_num(math.inf, math.inf)


def pattern(m: Mismatch) -> str:
    """What the difference of the updates says by itself; empty if nothing."""
    e, f = m.expected_update, m.found_update
    if bool((m.wrong & ~f.isfinite()).any()):
        return "not finite"
    still = m.wrong & (f == 0) & (e != 0)
    if bool(still.any()):
        if bool(still.all()):
            return "parameter not updated"
        blocks = _aligned_blocks(still.flatten())
        return f"elements unchanged: {'whole SIMD blocks' if blocks else f'{int(still.sum())} of {still.numel()}'}"
    ratio = m.constant_ratio
    if ratio is not None:
        if abs(ratio + 1) < 1e-3:
            return "sign of the update"
        return f"constant ratio {ratio:.4g}" if abs(ratio - 1) > 5e-4 else f"constant ratio 1 {ratio - 1:+.1g}"
    return ""


def _aligned_blocks(still: Tensor) -> bool:
    """Whether the unchanged elements are runs that begin and end at multiples of 8."""
    edges = (still[1:] != still[:-1]).nonzero().flatten() + 1
    return bool(still.sum() >= 8) and all(int(e) % 8 == 0 for e in edges)


def failed(
    check: str,
    what: str,
    m: Mismatch,
    causes: Sequence[tuple[str, Callable[[], Play] | Play]] = (),
    found: Play | None = None,
) -> Finding:
    """The error that a mismatch is.

    Args:
        check: the check's name.
        what: the comparison in words: "group with lr=0.2 against an optimizer with lr=0.2".
        m: the mismatch.
        causes: (cause, run): the cause is named if the run reproduces what was found.
        found: the run that was found.
    """
    cause = ""
    for name, run in causes:
        if found is not None and same_run(run() if callable(run) else run, found):
            cause = name
            break
    cause = cause or pattern(m)
    return Finding(check, "error", f"off by {abs(m.expected - m.found):.2g}", f"{what}: {m}", cause, m.details())


def same_run(a: Play, b: Play) -> bool:
    return parting(a, b, factor=4) is None


# Trees of state.


def leaves(x: Any, path: str = "") -> dict[str, Any]:
    """{path: leaf} of nested dicts and lists."""
    if isinstance(x, dict):
        items = [(f"{path}[{k!r}]", v) for k, v in x.items()]
    elif isinstance(x, list | tuple):
        items = [(f"{path}[{i}]", v) for i, v in enumerate(x)]
    else:
        return {path: x}
    return {k: leaf for p, v in items for k, leaf in leaves(v, p).items()}


def same(x: Any, y: Any) -> bool:
    """Leaves equal to the last bit, nan to itself."""
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.dtype != y.dtype or x.shape != y.shape:
            return False
        return difference(x, y) == 0
    return bool(x is y or x == y or (x != x and y != y))


def difference(x: Tensor, y: Tensor) -> float:
    """max|x − y|, 0 if empty."""
    x, y = (t.detach().to_dense() if t.is_sparse else t.detach() for t in (x, y))
    return float(_distance(x, y).max()) if x.numel() else 0.0


def tree_difference(expected: Any, found: Any) -> str:
    """The first leaf in which two trees differ, in words; empty if none."""
    a, b = leaves(expected), leaves(found)
    for path in a:
        if path not in b:
            return f"{path} is missing"
        if not same(a[path], b[path]):
            return f"{path}: expected {_brief(a[path])}, found {_brief(b[path])}"
    extra = [path for path in b if path not in a]
    return f"{extra[0]} is new" if extra else ""


def _brief(x: Any) -> str:
    if isinstance(x, Tensor) and x.dim():
        return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}, {x.flatten()[:3].tolist()}..."
    return repr(x)
