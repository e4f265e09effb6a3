"""A loss without a reference is compared with the textbook's, which it is recognised as: by its name, or by its values.

It is evaluated on single elements, or single rows of logits, over all regions of a family. Where it is the textbook's
everywhere, its mean must be the textbook's as well. Where it has the name of a family and equals it in part, the rest is
a mistake. Without the name it may be another loss, and that it equals a textbook's nearly everywhere is only noted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcalc.testing.contract import agree
from torchcalc.testing.grid import interval
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding
from torchcalc.testing.subject import CLEAR, Subject, name_of
from torchcalc.testing.textbook import FAMILIES, Family

NEUTRAL = ("loss", "fn", "func", "function", "my", "custom", "manual", "naive", "fast", "stable", "simple", "plain", "our",
           "own", "the", "apply", "criterion", "torch", "mean", "error")  # fmt: skip
#: Other values of options, which act as the textbook's do.
VARIED: tuple[tuple[str, Any], ...] = (
    ("label_smoothing", 0.3), ("ignore_index", 0), ("delta", 0.7), ("beta", 0.6), ("gamma", 1.5), ("log_target", True),
    ("log_input", False), ("full", True), ("pos_weight", 2.5), ("margin", 0.7), ("p", 2),
)  # fmt: skip
ENOUGH, NEARLY = 0.3, 0.8  # parts of the probes that make a loss of that name one of the family, or one without it


def named(subject: Subject) -> tuple[str, str]:
    """(the name, the same without words that say nothing), in small letters."""
    given = subject.given
    while hasattr(given, "func"):
        given = given.func
    name = type(given).__name__ if isinstance(given, torch.nn.Module) else name_of(given)
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+", name.replace(".", "_"))
    small = [w.lower() for w in words]
    bare = "".join(w for w in small if w not in NEUTRAL) or "".join(w for w in small if w != "loss")
    return "".join(small), bare


def values(subject: Subject, at: Sequence[Tensor]) -> Tensor | None:
    """The loss of each probe by itself, or None where it takes none."""
    each = subject.with_option(reduction="none") if subject.has_option("reduction") else None
    with torch.no_grad():
        try:
            if each is not None:
                (y,) = each.call(*at)
                return y if y.shape == at[1].shape else None
            found = [subject.call(*(x[k : k + 1] for x in at)) for k in range(len(at[0]))]
        except Exception:  # not of this family
            return None
    return torch.stack([y[0].reshape(()) for y in found]) if all(y[0].numel() == 1 for y in found) else None


def probes(subject: Subject, family: Family) -> tuple[Tensor, ...]:
    first = subject.floats()[0]
    if not family.classes:
        return tuple(x.to(first.device, subject.exact) for x in family.probes())
    c = first.shape[1]
    n = 6 * c
    t = torch.arange(n, device=first.device) % c
    if subject.option("ignore_index") in range(c):  # what is ignored has a check of its own
        t = torch.where(t == subject.option("ignore_index"), (subject.option("ignore_index") + 1) % c, t)
    generator = torch.Generator("cpu").manual_seed(5)
    x = torch.randn((n, c), generator=generator, dtype=torch.float64, device="cpu").to(first.device, subject.exact)
    x = x * torch.tensor([0.5, 2.0, 8.0], device=first.device, dtype=x.dtype).repeat_interleave(2 * c)[:, None]
    return (x.log_softmax(1) if family.name.startswith("negative") else x), t


def fits(subject: Subject, family: Family) -> bool:
    x, t, *others = subject.floats()
    if len(others) != (family.probes.__name__ == "variances"):
        return False
    if family.classes:
        return x.dim() >= 2 and t.dtype == torch.int64 and x.shape[0] == t.shape[0] and x.dim() == t.dim() + 1
    return t.is_floating_point() and x.shape == t.shape and not isinstance(subject.option("weight"), Tensor)


def same(y: Tensor, right: Tensor) -> Tensor:
    return (y - right).abs() <= 1e-8 * (right.abs() + 1e-4)


@check("loss", "textbook")
def textbook(subject: Subject) -> Finding | None:
    """A loss that has the name of a textbook's, or its values, is the textbook's in all regions, and so is its mean."""
    inputs = subject.floats()
    if subject.reference is not None:
        raise Skip("a reference is given")
    if subject.random or len(inputs) not in (2, 3) or not all(isinstance(x, Tensor) and x.numel() for x in inputs):
        raise Skip("not a loss of an input and a target")
    full, bare = named(subject)
    best: tuple[float, Family, Tensor, Tensor, Tensor, Tensor] | None = None
    for family in FAMILIES:
        if not fits(subject, family):
            continue
        x, t, *_ = at = probes(subject, family)
        y = values(subject, at)
        if y is None:
            continue
        right = family.formula(*at, subject.option)
        equal = float(same(y, right).double().mean()) + 1e-3 * (bare in family.words)
        if best is None or equal > best[0]:
            best = equal, family, x, t, y, right
    if best is None:
        raise Skip("not recognised as a loss of the textbooks")
    equal, family, x, t, y, right = best
    exact = bare in family.words
    if bool(same(y, right).all()):
        off_plane = (
            family.name.startswith("negative") and not exact
        )  # probes are log-probabilities, and only there they agree
        wrong = mean_of(subject, family, inputs) or (None if off_plane else gradient_of(subject, family))
        wrong = wrong or options_of(subject, family, exact)
        return wrong or Finding("", figure=f"is {family.name}")
    hinted = any(word in full for word in family.words if len(word) > 2) or has_option(subject, family.option)
    if exact and equal < ENOUGH:
        text = f"it is called {bare}, but is the {family.name} loss at no more than {equal:.0%} of the probes"
        return Finding("", "note", f"{equal:.0%}", text, f"not the textbook's {family.name}")
    if equal < ENOUGH or not (exact or hinted or equal >= NEARLY):
        raise Skip(f"not recognised as a loss of the textbooks; nearest is {family.name}, at {equal:.0%} of the probes")
    return mismatch(family, x, t, y, right, exact)


def has_option(subject: Subject, option: str) -> bool:
    return bool(option) and subject.has_option(option)


def mismatch(family: Family, x: Tensor, t: Tensor, y: Tensor, right: Tensor, exact: bool) -> Finding:
    bad = ~same(y, right)
    k = int(((y - right).abs() * bad).argmax())
    if family.classes:
        hit = sorted(set(t[bad].tolist()))
        where = f"for class {', '.join(map(str, hit[:5]))}" if len(hit) < len(set(t.tolist())) else ""
        at = f"for logits {[round(v, 3) for v in x[k].tolist()]} and class {int(t[k])}"
    else:
        r = x - t if family.probes.__name__ in ("residuals", "variances") else x
        where = interval(r, bad, torch.isin(t, t[bad]) | (family.probes.__name__ in ("residuals", "variances")))
        where = (
            where.replace("input", "input - target") if family.probes.__name__ in ("residuals", "variances") else where
        )
        at = f"for input {float(x[k]):.4g} and target {float(t[k]):.4g}"
    if not where and not family.classes and len(set(t[bad].tolist())) < len(set(t.tolist())):
        where = f"where the target is {', '.join(f'{v:g}' for v in sorted(set(t[bad].tolist()))[:3])}"
    text = (
        f"{int(bad.sum())} of {len(bad)} values are not those of the {family.name} loss; {at} it is {float(y[k]):.8g}, "
    )
    text += f"where {float(right[k]):.8g} is right"
    cause = f"not the textbook's {family.name}" + (f" {where}" if where else "")
    return Finding("", "error" if exact else "note", f"{int(bad.sum())} of {len(bad)} values", text, cause)


def gradient_of(subject: Subject, family: Family) -> Finding | None:
    """The gradient of each probe against that of the textbook's formula, away from kinks."""
    x, *others = probes(subject, family)
    each = subject.with_option(reduction="none") if subject.has_option("reduction") else subject

    def slope(of: Any, at: Tensor) -> Tensor:
        leaf = at.detach().clone().requires_grad_()
        y = of(leaf)
        return torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    def mine(z: Tensor) -> Tensor:
        if each is not subject:
            return each.call(z, *others)[0]
        rows = [subject.call(z[k : k + 1], *(o[k : k + 1] for o in others))[0].reshape(()) for k in range(len(z))]
        return torch.stack(rows)

    def right(z: Tensor) -> Tensor:
        return family.formula(z, *others, subject.option)

    try:
        found, expected = slope(mine, x), slope(right, x)
    except CLEAR:
        return None  # other checks tell
    beside = [slope(right, x * (1 + e) + e) for e in (1e-6, -1e-6)]
    size = expected.abs() + 1e-3
    smooth = (beside[0] - beside[1]).abs() <= 1e-2 * size
    bad = smooth & ~((found - expected).abs() <= 1e-6 * size)
    if not bad.any():
        return None
    k = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
    at = f"input {x[k].tolist()} and target {others[0][k].item():g}"
    text = f"{int(bad.sum())} of {bad.numel()} elements of the gradient are not those of {family.name}; first for {at}"
    where = ""
    if family.classes:
        hit = sorted(set(others[0][bad.any(1)].tolist()))
        where = f" for class {', '.join(map(str, hit[:5]))}" if len(hit) < x.shape[1] else ""
    return Finding("", "error", f"{int(bad.sum())} of {bad.numel()}", text, f"not the gradient of {family.name}{where}")


def options_of(subject: Subject, family: Family, exact: bool) -> Finding | None:
    """Other values of its options act as the textbook's; without the name of the family they may mean something else."""
    x = subject.floats()[0]
    words = family.formula.__code__.co_consts  # the options that the textbook has
    variants: list[dict[str, Any]] = [
        {name: value} for name, value in VARIED if name in words and subject.has_option(name)
    ]
    if "weight" in words and subject.has_option("weight"):
        w = torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype, device=x.device)
        variants += [
            {"weight": w},
            *([{"weight": w, "label_smoothing": 0.3}] if subject.has_option("label_smoothing") else []),
        ]
    for variant in variants:
        if any(isinstance(subject.option(name), Tensor) for name in variant):
            continue  # weights of its own
        varied = subject.with_option(**variant)
        told = replace_option(subject, variant)
        spelled = ", ".join(f"{k}={'weights' if isinstance(v, Tensor) else v}" for k, v in variant.items())
        at = probes(subject, family)
        try:
            y, right = values(varied, at), family.formula(*at, told)
        except (*CLEAR, AttributeError):
            continue
        if y is None:
            continue
        verdict: Any = "error" if exact else "note"
        if not bool(same(y, right).all()):
            found = mismatch(family, at[0], at[1], y, right, exact)
            return replace(found, cause=f"{found.cause} with {spelled}", diagnosis=f"with {spelled} {found.diagnosis}")
        wrong = mean_of(varied, family, subject.floats(), told)
        if wrong is not None:
            return replace(wrong, verdict=verdict, cause=f"{wrong.cause}, with {spelled}")
    return None


def replace_option(subject: Subject, variant: dict[str, Any]) -> Any:
    return lambda name, default=None: variant[name] if name in variant else subject.option(name, default)


def mean_of(subject: Subject, family: Family, inputs: Sequence[Any], told: Any = None) -> Finding | None:
    """The mean and the sum over the example against the textbook's."""
    told = told or subject.option
    if not subject.has_option("reduction") or len(inputs) > 2:
        return None
    x, t = inputs
    flat_x, flat_t = (x.movedim(1, -1).reshape(-1, x.shape[1]), t.reshape(-1)) if family.classes else (x, t)
    try:
        each = family.formula(flat_x, flat_t, told)
        (mean,) = subject.with_option(reduction="mean").call(x, t)
        (total,) = subject.with_option(reduction="sum").call(x, t)
    except CLEAR:
        return None
    n = each.new_tensor(float(each.numel()))
    if family.classes:
        kept = flat_t != told("ignore_index", -100)
        weight = told("weight", None)
        n = kept.sum().to(each.dtype)
        if isinstance(weight, Tensor):
            n = (weight.to(each.dtype)[torch.where(kept, flat_t, 0)] * kept).sum()
        if family.name in ("focal", "multi-margin"):
            return None  # no one mean of the textbooks
    if isinstance(told("pos_weight", None), Tensor):
        return None  # of each class its own
    part = replace(subject, wrt=())
    names = ("loss", family.name)
    found = agree(part, "with reduction='mean'", [mean], [each.sum() / n], names, "", values=True)
    cause = f"mean is not over {float(n):g}, as that of {family.name} is"
    found = None if found is None else replace(found, cause=cause)
    found = found or agree(
        part, "with reduction='sum'", [total], [each.sum()], names, "sum of another loss", values=True
    )
    if found is None and family.name == "KL divergence" and x.dim() and knows(subject, "batchmean"):
        with torch.no_grad():
            (batch,) = subject.with_option(reduction="batchmean").call(x, t)
        cause = "batchmean is not over the rows"
        found = agree(part, "with reduction='batchmean'", [batch], [each.sum() / len(x)], names, cause, values=True)
    return found


def knows(subject: Subject, word: str) -> bool:
    """Whether the code of a loss has the word in it, as the name of a reduction that it takes."""
    given = subject.given
    while hasattr(given, "func"):
        given = given.func
    code = getattr(given.forward if isinstance(given, torch.nn.Module) else given, "__code__", None)
    return word in (subject.option("reduction"), *(code.co_consts if code else ()))
