"""What is wrong: the worst element, and the pattern behind a mismatch in a few words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchcalc.testing.report import Finding, Verdict

COARSE, FINE = 1e-6, 1e-10  # relative differences that are but a note, or nothing
__all__ = ["Comparison", "compare", "regions"]


@dataclass(frozen=True)
class Comparison:
    """Two tensors that should agree.

    Attributes:
        what: "gradient of input 0 (x)".
        actual, expected: of one shape.
        allowed: the largest difference that is no error, for each element.
        use: the elements that are compared; None for all.
        regions: named masks of that shape, for "only where x < 0".
        alternatives: named tensors that actual may equal instead, for "grad_output ignored".
        names: what actual and expected are called.
    """

    what: str
    actual: Tensor
    expected: Tensor
    allowed: Tensor
    use: Tensor
    regions: Mapping[str, Tensor] = field(default_factory=dict)
    alternatives: Mapping[str, Tensor] = field(default_factory=dict)
    names: tuple[str, str] = ("analytic", "numeric")

    @property
    def excess(self) -> Tensor:
        """|actual - expected| / allowed; infinite where just one of the two is not finite."""
        excess = (self.actual - self.expected).abs() / self.allowed
        alike = (self.actual == self.expected) | (self.actual.isnan() & self.expected.isnan())
        return torch.where(alike | ~self.use, 0.0, excess.nan_to_num(torch.inf, torch.inf))

    def finding(self, verdict: Verdict = "error") -> Finding | None:
        """None if they agree."""
        excess = self.excess
        if not excess.numel() or not (excess > 1).any():
            return None
        worst = int(excess.argmax())
        index = [int(i) for i in torch.unravel_index(torch.tensor(worst, device="cpu"), excess.shape)]
        a, e, bar = (float(t.reshape(-1)[worst]) for t in (self.actual, self.expected, self.allowed))
        ratio = a / e if e else math.copysign(math.inf, a) if a else math.nan
        cause = self.cause(excess > 1)
        relative = float((self.actual - self.expected)[self.use].abs().max() / self.expected[self.use].abs().max())
        if relative < FINE:
            return None
        if relative < COARSE:  # not another derivative, but fewer digits, such as a constant in float32
            verdict, cause = "note", f"right to {relative:.0e} only"
        text = (
            f"{self.what}: {int((excess > 1).sum())} of {int(self.use.sum())} elements differ; worst at {index}: "
            f"{self.names[0]} {a:.10g}, {self.names[1]} {e:.10g} ± {bar:.1e}, ratio {ratio:.6g}"
        )
        details = dict(index=index, error_bar=bar, ratio=ratio, **dict(zip(self.names, (a, e), strict=True)))
        return Finding("", verdict, f"{abs(a - e):.1e} of {bar:.1e} allowed", text, cause, details)

    def cause(self, bad: Tensor) -> str:
        """The pattern of the mismatch, or "" if none fits."""
        for name, alternative in self.alternatives.items():
            close = (self.actual - alternative).abs() <= self.allowed
            if alternative.shape == self.actual.shape and bool(close[self.use].all()):
                return name
        if not self.actual.isfinite()[self.use].all():
            return "not finite"
        everywhere = pattern(self.actual[self.use], self.expected[self.use], self.allowed[self.use])
        if everywhere:
            return everywhere
        square = self.actual.dim() == 2 and self.actual.shape[0] == self.actual.shape[1]
        if square and bool(((self.actual.mT - self.expected).abs() <= self.allowed)[self.use & self.use.mT].all()):
            return "transposed"
        moved = self.moved()
        if moved:
            return moved
        for name, mask in self.regions.items():
            if (
                mask.shape == bad.shape
                and bool(bad.any())
                and torch.equal(bad, mask & self.use)
                and not mask[self.use].all()
            ):
                inside = pattern(self.actual[bad], self.expected[bad], self.allowed[bad])
                return f"only {name}" + (f": {inside}" if inside else "")
        return self.along_dimensions(bad)

    def moved(self) -> str:
        """Right numbers in wrong places."""
        slack = float(self.allowed.max())
        if not self.use.all() or self.actual.numel() < 2:
            return ""
        for dim in range(self.actual.dim()):
            if float((self.actual.flip(dim) - self.expected).abs().max()) <= slack:
                return f"reversed along dimension {dim}"
        order = (self.actual.reshape(-1).sort()[0] - self.expected.reshape(-1).sort()[0]).abs().max()
        return "right numbers in wrong places" if float(order) <= slack else ""

    def along_dimensions(self, bad: Tensor) -> str:
        """Patterns of rows and columns: a ratio or an offset that is constant along a dimension."""
        a, e = torch.where(self.use, self.actual, torch.nan), torch.where(self.use, self.expected, torch.nan)
        dims = [dim for dim in range(a.dim()) if a.dim() > 1 and a.shape[dim] > 1]
        ratio = torch.where(e.abs() > 1e3 * self.allowed, a / e, torch.nan)
        for dim in dims:
            if spread(a - e, dim) <= 4 * self.allowed.max():
                return f"constant offset along dimension {dim}"
            if spread(ratio, dim) <= 1e-6 * ratio.abs().nan_to_num(0).max():
                return f"constant ratio along dimension {dim}"
        for dim in dims:
            lines = [int(i) for i in bad.transpose(0, dim).flatten(1).any(1).nonzero()]
            if len(lines) < a.shape[dim]:
                return f"only index {', '.join(map(str, lines))} of dimension {dim}"
        return ""


def spread(x: Tensor, dim: int) -> float:
    """The largest difference between elements along dim, NaN left out; infinite if nothing is left to compare."""
    seen = ~x.isnan()
    if not (seen.sum(dim) > 1).any():
        return math.inf
    high = torch.where(seen, x, -torch.inf).amax(dim)
    low = torch.where(seen, x, torch.inf).amin(dim)
    return float((high - low)[seen.sum(dim) > 1].max())


def pattern(actual: Tensor, expected: Tensor, allowed: Tensor) -> str:
    """The relation between two tensors: zero, sign, constant ratio, constant offset; "" if none."""
    solid = expected.abs() > 1e2 * allowed  # where the ratio means something
    if bool((actual == 0).all()):
        return "silently zero"
    if not (expected.abs() > allowed).any():
        return "not zero, where the function is flat"
    if not solid.any():
        return ""
    ratio = actual[solid] / expected[solid]
    blur = 1e-5 * ratio.abs() + 2 * allowed[solid] / expected[solid].abs()
    r = float(ratio.median())
    if len(ratio) > 1 or actual.numel() == 1:
        off = ((actual - r * expected).abs() > 2 * allowed + 1e-5 * actual.abs()).any()
        if bool(((ratio - r).abs() <= blur).all()) and not off:
            return "sign" if abs(r + 1) < 1e-5 else f"constant ratio {r:.6g}{in_words(r, actual.numel())}"
        if bool(((actual.abs() - expected.abs()).abs() <= allowed).all()):
            return "sign of some elements"
    offset = actual - expected
    if len(offset) > 1 and float(offset.max() - offset.min()) <= 4 * float(allowed.max()):
        return f"constant offset {float(offset.mean()):.6g}"
    return ""


def in_words(ratio: float, count: int) -> str:
    for n, words in ((count, "number of elements"),):
        if n > 2 and math.isclose(ratio, n, rel_tol=1e-5):
            return f" = the {words}"
        if n > 2 and math.isclose(ratio, 1 / n, rel_tol=1e-5):
            return f" = 1 / the {words}"
    return ""


def regions(x: Tensor, rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Named masks of the elements of x where a mistake may live."""
    found = {"where the input is negative": x < 0, "where the input is positive": x > 0}
    for bound in (1.0, 2.0, 3.0, 6.0, 10.0):
        found[f"where |input| > {bound:g}"] = x.abs() > bound
        found[f"where |input| < {bound:g}"] = x.abs() < bound
        found[f"where input > {bound:g}"] = x > bound
        found[f"where input < -{bound:g}"] = x < -bound
    for name, mask in (rows or {}).items():
        if x.dim() >= 1 and mask.shape == x.shape[:1]:
            found[name] = mask.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)
    return found


def compare(
    what: str,
    actual: Tensor | None,
    expected: Tensor,
    allowed: Tensor | float,
    *,
    use: Tensor | None = None,
    regions: Mapping[str, Tensor] | None = None,
    alternatives: Mapping[str, Tensor] | None = None,
    names: tuple[str, str] = ("analytic", "numeric"),
    verdict: Verdict = "error",
) -> Finding | None:
    """A Finding if two tensors differ by more than is allowed; None for actual is a zero that nobody computed."""
    use = torch.ones_like(expected, dtype=torch.bool) if use is None else use
    bars = torch.as_tensor(allowed, dtype=expected.dtype, device=expected.device).expand_as(expected)
    if actual is not None and actual.shape != expected.shape:
        text = f"{what}: shape {list(actual.shape)}, where {list(expected.shape)} is right"
        return Finding("", verdict, "shape", text, "wrong shape")
    zeros = torch.zeros_like(expected)
    actual = actual.to_dense() if actual is not None and actual.layout != torch.strided else actual
    found = Comparison(
        what, zeros if actual is None else actual.to(expected.dtype), expected, bars, use,
        regions or {}, alternatives or {}, names,
    ).finding(verdict)  # fmt: skip
    if found is not None and actual is None:
        return Finding("", verdict, "None", found.diagnosis, "None returned", found.details)
    return found


def worst(findings: Sequence[Finding | None]) -> Finding | None:
    """The first error, else the first note, else None."""
    real = [f for f in findings if f is not None]
    return min(real, key=lambda f: f.verdict != "error", default=None)
