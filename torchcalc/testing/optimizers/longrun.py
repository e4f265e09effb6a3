"""The same rule at every step: 1,000 steps of a tiny problem, against the reference where there is one.

Without a reference, and where its first steps are those of no known rule, laws remain: a constant gradient, and one that
grows evenly, give updates that change smoothly from step to step; what counts the steps goes on counting; what was
finite stays finite; what it keeps does not grow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import Mismatch, leaves, parting, pattern
from torchcalc.testing.optimizers.reference import is_rule, reference_run, trusted
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import Grads, Play, gradients, parameters
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

STEPS = 1000
#: After which steps a rule that is costly to play that far is compared; counts wrap beside powers of two.
AT = (*range(13), 19, 20, 21, 31, 32, 33, 49, 50, 51, 99, 100, 101, 127, 128, 129, 200, 255, 256, 257, 500, 501, 1000)
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"momentum": 0.9, "weight_decay": 0.1}, {"weight_decay": 0.1})
COUNTS = {127: "8 bits", 128: "8 bits", 255: "8 bits", 256: "8 bits, or of bfloat16", 257: "bfloat16"}


def long_program(params: Sequence[Tensor], steps: int = STEPS) -> Grads:
    """Gradients of sizes 1e-3 to 10 by element, with zeros here and there, and one missing now and then."""
    grads = gradients(params, steps)
    for t, row in enumerate(grads):
        for i, g in enumerate(row):
            assert g is not None
            g.mul_(10.0 ** torch.linspace(-3, 1, g.numel(), dtype=g.dtype).reshape(g.shape))
            if t % 100 in (30, 31, 32):
                g.zero_()
            elif t % 100 in (60, 61):
                g.view(-1)[0] = 0
            if i == 1 and t % 250 == 90:
                row[i] = None
    return grads


def tiny(subject: OptimizerSubject) -> list[nn.Parameter]:
    return parameters(subject.shapes(((4,), (2, 3)))[:2], subject.exact)


@check("optimizer", "long run")
def long_run(subject: OptimizerSubject) -> Finding:
    """1,000 steps equal those of the reference, or of the known rule that the first steps are."""
    if subject.needs_closure:
        raise Skip("it needs a closure")
    rule = trusted(subject)
    if rule is None:
        raise Skip("no reference given, and its first steps are those of no known rule; see 'steady'")
    name, reference = rule
    params = tiny(subject)
    grads = long_program(params)
    at = AT if is_rule(reference) else range(STEPS + 1)
    if subject.reference is None or is_rule(reference):
        grads = [[torch.zeros_like(p) if g is None else g for p, g in zip(params, r, strict=True)] for r in grads]
    compared = 0
    for variant in VARIANTS if subject.reference is not None else ({},):
        if not all(subject.has(k) for k in variant):
            continue
        try:
            expected = reference_run(subject, params, reference)(grads, at=at, **variant)
        except (TypeError, ValueError, RuntimeError):
            continue
        for way_name, way in subject.each_way():
            play = subject.trial(params, grads, **way, **variant)
            m = parting(expected, [play[t] for t in at], factor=4)
            if m is not None:
                return departed(subject, name, f"{way_name}{f' with {variant}' if variant else ''}", m, at, grads, play)
            compared += 1
    if not compared:
        raise Skip(f"{name} refuses its options")
    how = "" if subject.reference is not None else ", recognised"
    return Finding("long run", figure=f"{len(at) - 1} of {STEPS} steps equal {name}{how}")


def departed(
    subject: OptimizerSubject, name: str, how: str, m: Mismatch, at: Sequence[int], grads: Grads, play: Play
) -> Finding:
    """The finding that a run is no longer that of its reference."""
    step = at[m.step]
    before = at[m.step - 1] if m.step else 0
    event = "a gradient of zero" if _zero(grads, step, m) else ""
    finite = bool(torch.as_tensor(m.found).isfinite())
    cause = f"wrong from step {step} on"
    if not finite:
        cause = f"not finite from step {step} on"
    elif event:
        cause = f"wrong where the gradient is zero, from step {step} on"
    elif step > 1 and restarted(subject, grads, play, step, m):
        cause = f"state starts anew at step {step}"
    elif pattern(m):
        cause = f"{cause}: {pattern(m)}"
    if finite and not event and step in COUNTS:
        cause += f"; a count of {COUNTS[step]} ends there"
    text = f"equal to {name}{how} for {before} steps, then not: {m}"
    verdict: Any = "error" if subject.reference is not None or not finite else "note"
    return Finding("long run", verdict, f"step {step}", text, cause, {**m.details(), "step": step})


def _zero(grads: Grads, step: int, m: Mismatch) -> bool:
    """Whether the gradient of the worst element was zero in that step or the one before."""
    rows = [grads[t - 1][m.parameter] for t in (step, step - 1) if t >= 1]
    return any(g is not None and not bool(g[m.index]) for g in rows)


def restarted(subject: OptimizerSubject, grads: Grads, play: Play, step: int, m: Mismatch) -> bool:
    """Whether the step is the first one of a new optimizer, where another step is not."""

    def anew(t: int) -> bool:
        begun = subject.trial([nn.Parameter(p.clone()) for p in play[t - 1]], grads[t - 1 : t])
        return parting([[row[m.parameter]] for row in begun], [[play[k][m.parameter]] for k in (t - 1, t)]) is None

    return anew(step) and not anew(2 if step > 2 else 3)


@check("optimizer", "steady")
def steady(subject: OptimizerSubject) -> Finding:
    """Under a constant or evenly growing gradient updates change smoothly over 1,000 steps, and stay finite."""
    if subject.needs_closure:
        raise Skip("it needs a closure")
    shape = subject.shapes(((4,),))[0]
    p = nn.Parameter(torch.zeros(shape, dtype=subject.exact))
    level = torch.linspace(0.5, 2, p.numel(), dtype=p.dtype).reshape(shape)
    slope = torch.where(torch.arange(p.numel()).reshape(shape) % 2 == 0, 0.0, 0.02).to(p.dtype)
    optimizer = subject.make([p], **({"weight_decay": 0.0} if subject.has("weight_decay") else {}))
    sizes, seen, scalars = [], [torch.zeros_like(p)], []
    for t in range(STEPS):
        subject.step(optimizer, [p], [level * (1 + slope * t)])
        seen.append(p.detach().clone())
        if t + 1 in (10, 300, 600):
            sizes.append(held(optimizer))
        if t + 1 in (3, 5, STEPS):
            scalars.append(counts(optimizer))
    play = torch.stack(seen).flatten(1)
    if not bool(play.isfinite().all()):
        first = int((~play.isfinite()).any(1).nonzero()[0])
        if float(play[first - 1].abs().max()) < 1e100:
            text = f"after step {first} of a gradient of 0.5 to 2 a parameter is {play[first].tolist()[:3]}..."
            return Finding("steady", "error", f"step {first}", text, f"not finite from step {first} on")
    stuck = [
        f"{k} is {scalars[2].get(k)} after {STEPS} steps" for k, v in scalars[0].items()
        if v == 3 and scalars[1].get(k) == 5 and scalars[2].get(k) != STEPS
    ]  # fmt: skip
    if stuck:
        text = f"what counts the steps at first does not any more: {'; '.join(stuck)}"
        return Finding("steady", "note", "count", text, "the count of steps wraps or stops")
    if sizes[0] < sizes[1] < sizes[2] and sizes[2] - sizes[1] >= 300:
        text = f"numbers and entries held by the optimizer: {sizes[0]}, {sizes[1]}, {sizes[2]} after 10, 300, 600 steps"
        return Finding("steady", "note", "grows", text, "what it keeps grows with every step")
    if torch.equal(play[0], play[1]) and not torch.equal(play[1], play[2]):
        text = "a first gradient of 0.5 to 2 moves nothing, the second one does: a step is lost, or lr is 0 at first"
        return Finding("steady", "note", "step 1", text, "the first step does nothing")
    if subject.exact != torch.float64:
        return Finding("steady", figure=f"{STEPS} steps, finite; too coarse to say whether smooth")
    return _jumps(subject, play.diff(dim=0))


def _jumps(subject: OptimizerSubject, updates: Tensor) -> Finding:
    """Steps at which the updates of an element leave the smooth curve that they have followed."""
    scale = updates.abs().amax(0).clamp(min=1e-300)
    bend = (updates[3:] - 3 * updates[2:-1] + 3 * updates[1:-2] - updates[:-3]) / scale
    bend = bend.abs().nan_to_num(0)
    usual = torch.stack([bend[k : len(bend) - 5 + k] for k in range(4)]).amax(0)
    jump = bend[5:] > 50 * usual + 1e-5  # what is kept in float32 has noise of 1e-7
    steps = sorted({int(t) + 9 for t in jump.any(1).nonzero().flatten()})
    firsts = [t for t in steps if t - 1 not in steps]
    if not firsts:
        return Finding("steady", figure=f"{len(updates)} steps, smooth")
    gaps = {b - a for a, b in itertools.pairwise(firsts)}
    period = firsts[0] if len(firsts) > 2 and len(gaps) == 1 and gaps in ({firsts[0]}, {firsts[0] - 1}) else None
    period = min(gaps) if len(firsts) > 2 and len(gaps) == 1 else period
    when = f"every {period} steps" if period else f"at step {', '.join(map(str, firsts[:4]))}"
    marks = {float(x) for x in leaves(dict(subject.defaults)).values() if isinstance(x, int | float) and x == x}
    at = {float(abs(u)) for t in firsts for u in updates[t - 1]}
    numbers = {float(x) for t in (*firsts, period or firsts[0]) for x in (t - 1, t, t + 1)} & marks
    if numbers or any(math.isclose(a, m, rel_tol=1e-6) for a in at for m in marks if m):
        return Finding("steady", figure=f"updates change {when}, as its options say")
    text = (
        f"under a constant or evenly growing gradient the updates follow a smooth curve, and leave it {when}: "
        f"{updates[firsts[0] - 2].tolist()[:2]} is followed by {updates[firsts[0] - 1].tolist()[:2]}"
    )
    return Finding("steady", "note", when, text, f"another rule {when}", {"steps": firsts[:50]})


def counts(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The scalars among state and groups."""
    found: dict[str, Any] = {}
    for i, group in enumerate(optimizer.param_groups):
        found.update(leaves({k: v for k, v in group.items() if k != "params"}, f"param_groups[{i}]"))
    for i, (_, state) in enumerate(optimizer.state.items()):
        found.update(leaves(state, f"state[{i}]"))
    scalars = {k: v for k, v in found.items() if isinstance(v, int | float) or (isinstance(v, Tensor) and not v.dim())}
    return {k: float(v) for k, v in scalars.items() if not (isinstance(v, Tensor) and v.is_complex())}


def held(optimizer: torch.optim.Optimizer) -> int:
    """How many numbers and entries it keeps."""
    own = {k: v for k, v in vars(optimizer).items() if k not in ("param_groups", "state")}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    trees = [*optimizer.state.values(), own, *groups]
    return sum(x.numel() if isinstance(x, Tensor) else 1 for tree in trees for x in leaves(tree).values())
