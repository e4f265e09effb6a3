"""Arguments that make no sense: refused, before anything is changed."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torchcalc.testing.optimizers.compare import tree_difference
from torchcalc.testing.optimizers.subject import OptimizerSubject
from torchcalc.testing.optimizers.tensors import gradients, snapshot
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding

NAN, INF = math.nan, math.inf
NONSENSE: dict[str, tuple[Any, ...]] = {
    "lr": (-1.0, NAN, INF),
    "weight_decay": (-1.0, NAN, INF),
    "eps": (-1.0, NAN),
    "momentum": (-1.0, NAN),
    "betas": ((-0.5, 0.9), (2.0, 2.0), (NAN, 0.9)),
    "alpha": (-1.0, NAN),
    "rho": (-1.0, 2.0, NAN),
    "lr_decay": (-1.0, NAN),
}


def values(subject: OptimizerSubject) -> list[tuple[str, Any]]:
    known = [(k, v) for k, vs in NONSENSE.items() if subject.defaults.get(k) is not None for v in vs]
    if not known:
        raise Skip("it has no option that is known here")
    return known


def spelled(pairs: list[tuple[str, Any]]) -> str:
    return ", ".join(f"{k}={v}" for k, v in pairs)


@check("optimizer", "arguments")
def arguments(subject: OptimizerSubject) -> Finding:
    """The constructor refuses nonsense: lr=-1, nan, inf, betas outside of [0, 1)."""
    accepted, odd = [], []
    for option, value in values(subject):
        if option not in subject.accepts:
            continue
        try:
            subject.make(subject.parameters(), **{option: value})
        except ValueError:
            continue
        except Exception as error:
            odd.append(f"{option}={value} raises {type(error).__name__}, not ValueError")
            continue
        accepted.append((option, value))
    if not subject.accepts:
        raise Skip("the factory takes no options")
    if accepted or odd:
        text = "; ".join([*([f"the constructor accepts {spelled(accepted)}"] if accepted else []), *odd])
        return Finding("arguments", "note", f"{len(accepted)} accepted", text, "nonsense accepted")
    return Finding("arguments", figure=f"{len(values(subject))} refused")


@check("optimizer", "group arguments")
def group_arguments(subject: OptimizerSubject) -> Finding:
    """A group with nonsense is refused, and the optimizer stays as it was."""
    accepted = []
    for option, value in values(subject):
        params = subject.parameters()
        optimizer = subject.make(params)
        subject.step(optimizer, params, gradients(params, 1)[0])
        before = snapshot(optimizer)
        given = {"params": subject.parameters(seed=3), option: value}
        try:
            optimizer.add_param_group(given)
        except Exception:
            text = tree_difference(before, snapshot(optimizer))
            if text:
                text = f"add_param_group with {option}={value} raises, but has changed the optimizer: {text}"
                return Finding("group arguments", "error", "changed", text, "changed before it raised")
            continue
        accepted.append((option, value))
    if accepted:
        text = f"a group's {spelled(accepted)} is accepted: it takes effect in the next step"
        return Finding("group arguments", "note", f"{len(accepted)} accepted", text, "nonsense accepted in a group")
    return Finding("group arguments", figure=f"{len(values(subject))} refused")


@check("optimizer", "group keys")
def group_keys(subject: OptimizerSubject) -> Finding:
    """Keys of the user's own are kept in a group; a misspelt option gives a warning."""
    p, q = subject.parameters()[0], subject.parameters(seed=3)[0]
    optimizer = subject.make([p])
    try:
        optimizer.add_param_group({"params": [q], "name": "head", "lr_scale": 0.5})
    except ValueError as reason:
        raise Skip(f"it takes one group only: {reason}") from reason
    kept = optimizer.param_groups[1]
    if kept.get("name") != "head" or kept.get("lr_scale") != 0.5:
        text = f"keys name, lr_scale are not in {sorted(kept)}"
        return Finding("group keys", "error", "dropped", text, "keys dropped")
    option = next((k for k in ("weight_decay", "momentum", "maximize") if k in subject.defaults), None)
    if option is None:
        return Finding("group keys", figure="kept")
    misspelt = option[:2] + option[3] + option[2] + option[4:]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            subject.make([{"params": [subject.parameters()[0]], misspelt: subject.defaults[option]}])
        except (KeyError, TypeError, ValueError):
            return Finding("group keys", figure=f"{misspelt} refused")
    if not any(misspelt in str(w.message) for w in said):
        text = f"a group with {misspelt!r} is accepted without a warning, and {option} keeps its default"
        return Finding("group keys", "note", misspelt, text, "misspelt option accepted")
    return Finding("group keys", figure=f"warns of {misspelt}")
