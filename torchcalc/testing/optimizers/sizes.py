"""Gradients and step sizes of every size, zeros, and nan: the rule is the same for all of them.

Parameters start at zero, so that an update of 1e-30 is seen to its last digits, and each element is judged by the way
that it went itself. With a reference, or where the first steps are those of a known rule, the runs are compared. Without
one, laws: what is in proportion for factors of 2 is so for factors of 2^±60; a gradient of zero is the limit of small
ones; nan does not get lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import Mismatch, leaves, parting, pattern
from torchcalc.testing.optimizers.reference import reference_run, trusted
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, Play, gradients
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

#: Of which powers of ten the gradients of the elements are. Squares stay within the dtype.
POWERS = {torch.float64: 30, torch.float32: 15}
LRS = (1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0, 1e3)


def zeros(subject: OptimizerSubject, count: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    shape = subject.shapes(((count,),))[0]
    return nn.Parameter(torch.zeros(shape, dtype=dtype or subject.exact))


def of_all_sizes(p: Tensor, steps: int) -> tuple[Grads, Tensor]:
    """Gradients whose elements have a size of their own, and these sizes."""
    power = POWERS[p.dtype]
    size = 10.0 ** torch.linspace(-power, power, p.numel(), dtype=torch.float64).reshape(p.shape)
    rows = [[(g.double() * size).to(p.dtype)] for (g,) in gradients([p], steps) if g is not None]
    return [list(row) for row in rows], size


def judged(
    subject: OptimizerSubject, check: str, what: str, m: Mismatch, cause: str, by_design: bool = False
) -> Finding:
    """An error if a reference was given; else a note, for it may be meant."""
    verdict: Any = "error" if subject.reference is not None and not by_design else "note"
    return Finding(check, verdict, f"off by {abs(m.expected - m.found):.2g}", f"{what}: {m}", cause, m.details())


@check("optimizer", "gradient sizes")
def gradient_sizes(subject: OptimizerSubject) -> Finding:
    """Gradients from 1e-30 to 1e30 step by the same rule: as in the reference, or in proportion."""
    if subject.needs_closure:
        raise Skip("it needs a closure")
    rule = trusted(subject)
    if rule is None or not subject.elementwise:
        return proportion(subject, "gradient sizes")
    compared = 0
    for dtype in (d for d in POWERS if d in subject.dtypes):
        p = zeros(subject, 2 * POWERS[dtype] + 1, dtype)
        grads, size = of_all_sizes(p, 8)
        for row in grads[3:5]:
            for g in row:
                assert g is not None
                g.view(-1)[::3] = 0  # exact zeros among them
        expected = reference_run(subject, [p], rule[1])(grads)
        # A rule in higher precision keeps squares that the format flushes: only what both can hold is compared.
        for name, way in subject.each_way():
            found = subject.trial([p], grads, **way)
            m = parting(*_normal(expected, found, dtype), factor=8, each=True)
            if m is not None:
                at = float(size[m.index])
                text = f"{rule[0]} against this{name} in {dtype}, with gradients of size {at:.0e}"
                cause = f"wrong for gradients of size {_range(m, size)}"
                still = m.wrong & (m.found_update == 0)
                cause += ": elements unchanged" if bool(still.any()) and not bool(m.found_update[m.index]) else ""
                return judged(subject, "gradient sizes", text, m, cause)
            compared += 1
    return Finding("gradient sizes", figure=f"1e-30 to 1e30, as {rule[0]}")


def _normal(expected: Play, found: Play, dtype: torch.dtype) -> tuple[Play, Play]:
    """Both runs, the expected one taken where numbers are below what the format holds to full precision."""
    least = torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    pairs = [
        (e, torch.where((e.abs() < least) & (f.abs() < least), e.to(f.dtype), f))
        for (e,), (f,) in zip(expected, found, strict=True)
    ]
    return [[e] for e, _ in pairs], [[f] for _, f in pairs]


def _range(m: Mismatch, size: Tensor) -> str:
    wrong = size[m.wrong]
    return f"{float(wrong.min()):.0e}" + (f" to {float(wrong.max()):.0e}" if wrong.numel() > 1 else "")


def proportion(subject: OptimizerSubject, name: str) -> Finding:
    """A rule that is homogeneous for factors of 2 is so for all; ε, if there is one, grows along."""
    p = zeros(subject, 7)
    grads = gradients([p], 5)
    plain = {"weight_decay": 0.0} if subject.has("weight_decay") else {}
    base = subject.trial([p], grads, **plain)

    def run(factor: float, power: int) -> Play:
        options = dict(plain)
        if power:
            options["eps"] = subject.defaults["eps"] * factor**power
        return subject.trial([p], [[None if g is None else g * factor for g in row] for row in grads], **options)

    eps = subject.defaults.get("eps")
    powers = (0, 1, 2) if isinstance(eps, float) and eps and "eps" in subject.accepts else (0,)
    for power in powers:
        for degree in (0, 1):

            def expected(factor: float, degree: int = degree) -> Play:
                return [[x * factor**degree for x in row] for row in base]

            if any(parting(expected(f), run(f, power), factor=8) is not None for f in (2.0, 0.5)):
                continue
            for k in (4, 8, -8, 16, -16, 30, -30, *((60, -60, 90, -90) if p.dtype == torch.float64 else ())):
                m = parting(expected(2.0**k), run(2.0**k, power), factor=8, each=subject.elementwise)
                if m is not None:
                    size = f"{2.0**k:.0e}"
                    law = "in proportion to" if degree else "independent of the size of"
                    text = f"for gradients of size 1 the steps are {law} the gradients, at {size} they are not"
                    return judged(subject, name, text, m, f"another rule for gradients of size {size}")
            return Finding(name, figure=f"homogeneous of degree {degree}")
    raise Skip("no reference given, and its steps are not homogeneous in the gradient")


@check("optimizer", "lr sizes")
def lr_sizes(subject: OptimizerSubject) -> Finding:
    """Step sizes from 1e-12 to 1e3 count as they are: as in the reference, or in proportion."""
    lr = subject.lr
    if subject.needs_closure:
        raise Skip("it needs a closure")
    p = zeros(subject, 5)
    grads = gradients([p], 5)
    rule = trusted(subject) if subject.reference is not None else None
    plain = {"weight_decay": 0.0} if subject.has("weight_decay") else {}
    base = subject.trial([p], grads, **plain)

    def in_proportion(value: float) -> Play:
        return [[x * (value / lr) for x in row] for row in base]

    if rule is not None:
        play = reference_run(subject, [p], rule[1])
        expect: Callable[[float], Play] = lambda value: play(grads, lr=value)  # noqa: E731
    elif lr and all(
        parting(in_proportion(v), subject.trial([p], grads, lr=v, **plain), factor=8) is None for v in (2 * lr, lr / 2)
    ):
        expect = in_proportion
    else:
        raise Skip("no reference given, and its steps are not in proportion to lr")
    finding = standing_still(subject, rule)
    if finding is not None:
        return finding
    tried = 0
    for value in LRS:
        for name, way in subject.each_way():
            options = way if rule is not None else {**way, **plain}
            try:
                expected, found = expect(value), subject.trial([p], grads, lr=value, **options)
            except (TypeError, ValueError):
                continue
            tried += 1
            m = parting(expected, found, factor=8, each=subject.elementwise)
            if m is None:
                continue
            seen = leaves(dict(subject.defaults)).values()
            meant = any(isinstance(x, float) and x and abs(m.ratio * value - x) < 1e-3 * abs(x) for x in seen)
            acts = f": it steps as with lr={m.ratio * value:.3g}" if m.ratio == m.ratio else ""
            side = "floor of lr" if abs(m.ratio) > 1 else "cap on lr"
            text = f"lr={value:g}{name}, against {rule[0] if rule else f'lr={lr:g}, in proportion'}"
            return judged(subject, "lr sizes", text, m, f"{side}{acts}", by_design=meant)
    if not tried:
        raise Skip("it takes no other lr")
    return Finding("lr sizes", figure=f"{tried} runs from 1e-12 to 1e3")


def standing_still(subject: OptimizerSubject, rule: tuple[str, Callable[..., Any]] | None) -> Finding | None:
    """With lr=0 weight decay does what the reference's does: nothing, unless it does not go by lr."""
    if not subject.has("weight_decay"):
        return None
    params = subject.parameters()
    grads = gradients(params, 2)
    options = {"lr": 0.0, "weight_decay": 0.1}
    try:
        found = subject.trial(params, grads, **options)
        expected = reference_run(subject, params, rule[1])(grads, **options) if rule else found[:1] * 3
    except (TypeError, ValueError):
        return None
    m = parting(expected, found)
    if m is None or parting(found[:1] * 3, subject.trial(params, grads, lr=0.0, weight_decay=0.0)) is not None:
        return None  # or it moves without decay as well: a floor of lr, as will be seen
    return judged(subject, "lr sizes", "lr=0 with weight_decay=0.1", m, "weight decay does not go by lr: lr=0 moves")


@check("optimizer", "zero gradients")
def zero_gradients(subject: OptimizerSubject) -> Finding:
    """A gradient of exactly zero, of a parameter or an element, steps as a tiny one of either sign does."""
    if subject.needs_closure:
        raise Skip("it needs a closure")
    params = subject.parameters()[:2]
    grads = gradients(params, 6)
    small = 1e-150 if subject.exact == torch.float64 else 1e-30
    for where in ("the whole gradient", "some elements"):
        runs = []
        for tiny in (0.0, small, -small):
            rows = [[None if g is None else g.clone() for g in row] for row in grads]
            for row in rows[3:5]:
                for g in row:
                    assert g is not None
                    (g if where == "the whole gradient" else g.view(-1)[::2]).fill_(tiny)
            runs.append(subject.trial(params, rows))
        zero, above, below = runs
        if parting(above, below, factor=4) is not None:
            continue  # the sign of a small one counts: a rule of signs
        m = parting(above, zero, factor=4)
        if m is not None:
            still = all(bool((a == b).all()) for a, b in zip(zero[3], zero[4], strict=True))
            cause = "a gradient of zero is skipped" if still else "a gradient of zero steps by another rule"
            return judged(subject, "zero gradients", f"{where} 0 in steps 4 and 5, against ±{small:g}", m, cause)
    return Finding("zero gradients", figure="the limit of small ones")


@check("optimizer", "nan gradients")
def nan_gradients(subject: OptimizerSubject) -> Finding:
    """nan in a gradient makes its element nan, or the whole step is left out; it is not taken for a number."""
    if subject.needs_closure:
        raise Skip("it needs a closure")
    params = subject.parameters()[:2]
    rule = trusted(subject)
    for name, way in subject.each_way():
        for bad in (torch.nan, torch.inf, -torch.inf):
            grads = gradients(params, 4)
            g = grads[2][0]
            assert g is not None
            g.view(-1)[0] = bad
            found = subject.trial(params, grads, **way)
            left_out = all(torch.equal(a, b) for a, b in zip(found[2], found[3], strict=True))
            if left_out:
                return Finding("nan gradients", figure="the whole step is left out")
            swallowed = bad != bad and bool(found[3][0].isfinite().all())
            if rule is not None:
                # What inf makes of the state depends on how the rule is spelled; the step itself does not.
                upto = len(found) if bad != bad else 4
                m = parting(reference_run(subject, params, rule[1])(grads)[:upto], found[:upto], factor=4)
                if m is not None:
                    cause = f"{bad} taken for a number" if bool(found[-1][0].isfinite().all()) else pattern(m)
                    cause = cause or f"another rule at {bad}"
                    return judged(subject, "nan gradients", f"a gradient of {bad}{name} against {rule[0]}", m, cause)
            elif swallowed:
                text = f"with nan in a gradient{name} the parameter goes on from {found[2][0].flatten()[0]:.6g} to "
                text += f"{found[3][0].flatten()[0]:.6g}: what has gone wrong before is hidden"
                return Finding("nan gradients", "note", "hidden", text, "nan taken for a number")
    return Finding("nan gradients", figure="nan and inf come through" if rule is None else f"as {rule[0]}")
