"""Upstream gradients of all sizes: backward is linear in grad_output, from 1e-30 to 1e30 and for any mixture.

What is clamped, flushed, rounded, or scaled by the largest element breaks J'(s·v) = s·J'v for some s, or J'(v + w) =
J'v + J'w for parts of different sizes. A power of two is exact, so that only rounding is allowed for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchcalc.testing.diagnosis import compare
from torchcalc.testing.graph import custom
from torchcalc.testing.numeric import need_derivatives
from torchcalc.testing.registry import check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import Subject, pull

POWERS = (0, 2, 4, 6, 8, 10, 13, 16, 20, 24, 30, 40, 60, 100)


@check("function", "upstream sizes")
def upstream_sizes(subject: Subject) -> Finding | None:
    """J'(s·v) = s·J'v for s from 1e-30 to 1e30 and -1, and the parts of a mixed v add up."""
    need_derivatives(subject)
    inputs = subject.floats()
    leaves = subject.leaves(inputs, subject.wrt)
    outputs = subject.call(*leaves)
    xs = [leaves[i] for i in subject.wrt]
    if not any(y.requires_grad and y.numel() for y in outputs):
        return None

    def back(v: Sequence[Tensor]) -> list[Tensor]:
        grads = pull(outputs, xs, v)
        return [torch.zeros_like(x) if g is None else g.detach().clone() for g, x in zip(grads, xs, strict=True)]

    v = subject.incoming(outputs)
    base = back(v)
    if not all(g.isfinite().all() for g in base):
        return None  # "gradient" tells
    # J'v is made of products with v that may cancel, as where a softmax has saturated, and has the rounding of these
    least = 1e-3 * max(
        (float((w * y.detach()).abs().max()) for w, y in zip(v, outputs, strict=True) if y.numel()), default=0.0
    )
    for power in sorted({sign * p for p in POWERS for sign in (1, -1)}, key=abs):
        s = 2.0**power
        sizes = [s * max(float(g.abs().max()) if g.numel() else 0.0, least) for g in base]
        found = differ(subject, back([s * w for w in v]), [s * g for g in base], "J'(s·v)", "s·J'v", sizes)
        if found is not None:
            size = max(float(w.abs().max()) for w in v if w.numel()) * s
            least = min(float(w.abs().min()) for w in v if w.numel()) * s
            where = f"|grad_output| > {size / 3:.2g}" if power >= 0 else f"|grad_output| < {least * 3:.2g}"
            return replace(found, cause=f"backward is not linear in grad_output: wrong for {where}")
    found = differ(subject, back([-w for w in v]), [-g for g in base], "J'(-v)", "-J'v")
    if found is not None:
        return replace(found, cause="backward is not linear in grad_output: wrong for its negative")
    for name, one, other in mixtures(v):
        parts = list(zip(back(one), back(other), strict=True))
        total = [a + b for a, b in parts]
        largest = max((float((a + b).abs().max()) for a, b in zip(one, other, strict=True) if a.numel()), default=0.0)
        sizes = [
            max(float((a.abs() + b.abs()).max()) if a.numel() else 0.0, least * max(largest, 1.0)) for a, b in parts
        ]
        together = back([a + b for a, b in zip(one, other, strict=True)])
        found = differ(subject, together, total, "J'(v + w)", "J'v + J'w", sizes)
        if found is not None:
            return replace(found, cause=f"backward is not linear in grad_output: wrong for {name}")
    return swallowed(subject, outputs, v, back) or Finding("", figure="from 1e-30 to 1e30")


def swallowed(
    subject: Subject, outputs: Sequence[Tensor], v: Sequence[Tensor], back: Callable[[Sequence[Tensor]], list[Tensor]]
) -> Finding | None:
    """Infinity or NaN in an element of grad_output that does not reach what the element counts for."""
    for j, w in enumerate(v):
        for k in sorted({0, w.numel() // 2, w.numel() - 1}) if w.numel() else ():
            alone = [torch.zeros_like(u) for u in v]
            alone[j].view(-1)[k] = w.reshape(-1)[k]
            part = back(alone)
            if not any(bool(g.any()) for g in part):
                continue
            for bad in (torch.inf, torch.nan):
                poisoned = [u.clone() for u in v]
                poisoned[j].view(-1)[k] = bad
                for i, g, p in zip(subject.wrt, back(poisoned), part, strict=True):
                    lost = (p.abs() > 1e-6 * p.abs().max().clamp(min=1e-300)) & g.isfinite()
                    if not lost.any():
                        continue
                    text = f"with {bad} in grad_output {int(lost.sum())} elements of the gradient of {subject.label(i)}"
                    text += " that depend on it stay finite: a gradient scaler looks for just that"
                    return Finding(
                        "",
                        "error" if custom(outputs) else "note",
                        f"{bad}",
                        text,
                        f"{bad} in grad_output is taken for a number",
                    )
    return None


def mixtures(v: Sequence[Tensor]) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """Named pairs of grad_outputs that are added: of two sizes, with zeros, equal throughout."""
    odd = [(torch.arange(w.numel(), device=w.device) % 2 == 1).view(w.shape) for w in v]
    halves = [w * m for w, m in zip(v, odd, strict=True)], [w * ~m for w, m in zip(v, odd, strict=True)]
    ones = [torch.ones_like(w) for w in v]
    return [
        ("one with zeros", *halves),
        ("one of mixed sizes", halves[0], [2.0**20 * w for w in halves[1]]),
        ("one with tiny elements", halves[0], [2.0**-30 * w for w in halves[1]]),
        ("one that is 1 throughout", [w * m for w, m in zip(ones, odd, strict=True)],
         [w * ~m for w, m in zip(ones, odd, strict=True)]),
    ]  # fmt: skip


def differ(
    subject: Subject,
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
    name: str,
    other: str,
    sizes: Sequence[float] = (),
) -> Finding | None:
    """The first gradient that differs by more than rounding, of which sizes are the largest numbers added up."""
    eps = torch.finfo(subject.exact).eps
    sizes = sizes or [float(e.abs().max()) if e.numel() else 0.0 for e in expected]
    for i, g, e, size in zip(subject.wrt, got, expected, sizes, strict=True):
        if not e.numel():
            continue
        allowed = 1e4 * eps * size + 1e3 * torch.finfo(subject.exact).tiny
        found = compare(f"gradient of {subject.label(i)}", g, e, allowed, names=(name, other))
        if found is not None and found.verdict == "error":
            return found
    return None
