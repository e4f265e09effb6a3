"""What an optimizer is compared with: the reference that was given, or the known rule that its first steps are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import parting
from torchcalc.testing.optimizers.subject import WAYS, OptimizerSubject, spelled
from torchcalc.testing.optimizers.tensors import Grads, Play, gradients
from torchcalc.testing.optimizers.textbook import lion

__all__ = ["Runner", "recognised", "reference_run", "trusted"]

Runner = Callable[..., Play]

#: The known rules, by the name that a report gives them.
KNOWN: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(torch.optim, name)
        for name in ("SGD", "AdamW", "Adam", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta", "Rprop")
    },
    "Lion": lambda p, gradients, *, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False: [
        p, *lion(p, gradients, "", lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)
    ][-1],
}  # fmt: skip
#: Other names of hyperparameters.
ALIASES = {
    "momentum": ("mu", "beta", "momentum_factor"),
    "eps": ("epsilon", "eps_root"),
    "alpha": ("rho", "decay_rate", "smoothing", "beta2", "beta"),
    "weight_decay": ("wd", "decay", "l2"),
    "lr": ("learning_rate", "step_size", "eta"),
}
HOW = (*WAYS, "capturable", "differentiable")


def hyperparameters(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, and under their usual names those that are called otherwise."""
    known = dict(defaults)
    for name, others in ALIASES.items():
        found = [defaults[other] for other in others if other in defaults]
        if name not in known and found:
            known[name] = found[0]
    for one, two in (("beta1", "beta2"), ("b1", "b2")):
        if "betas" not in known and one in defaults and two in defaults:
            known["betas"] = (defaults[one], defaults[two])
    return known


def reference_run(subject: OptimizerSubject, params: list[nn.Parameter], reference: Callable[..., Any]) -> Runner:
    """What plays the reference from these parameters: an optimizer's factory, or a rule over a whole trajectory.

    The runner takes gradients, ``at``, the steps after which its parameters are wanted (default: all), and options.
    """
    if is_rule(reference):
        return lambda grads, at=None, **variant: _rule_run(subject, params, grads, at, variant, reference)
    takes = OptimizerSubject(reference).accepts
    hyper = {**hyperparameters(subject.defaults), **subject.options}
    twin = OptimizerSubject(reference, {k: v for k, v in hyper.items() if k in takes and k not in HOW})

    def run(grads: Grads, at: Sequence[int] | None = None, **variant: Any) -> Play:
        play = twin.trial(params, grads, **twin.with_reference_way(), **variant)
        return play if at is None else [play[t] for t in at]

    return run


def is_rule(reference: Callable[..., Any]) -> bool:
    """Whether it takes a parameter and its gradients, not parameters alone."""
    required = [
        p
        for p in inspect.signature(reference).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return not isinstance(reference, type) and len(required) >= 2


def _rule_run(
    subject: OptimizerSubject, params: list[nn.Parameter], grads: Grads, at: Sequence[int] | None,
    variant: dict[str, Any], rule: Callable[..., Any],
) -> Play:  # fmt: skip
    names = inspect.signature(rule).parameters
    hyper = {k: v for k, v in {**hyperparameters(subject.defaults), **variant}.items() if k in names}
    if any(k not in names for k in variant):
        raise ValueError(f"the rule takes no {sorted(variant)}")

    def upto(i: int, t: int) -> Tensor:
        return torch.as_tensor(rule(params[i].detach().clone(), [step[i] for step in grads[:t]], **hyper))

    return [[upto(i, t) for i in range(len(params))] for t in at or range(len(grads) + 1)]


def recognised(subject: OptimizerSubject) -> tuple[str, Callable[..., Any]] | None:
    """The name of the known rule whose steps its first six are, and the rule; None if it is none of them."""
    if subject.needs_closure or subject.is_noisy:
        return None
    params = subject.parameters()[:2]
    grads = gradients(params, 6)
    try:
        found = subject.trial(params, grads)
    except Exception:  # another check says so
        return None
    for name, reference in KNOWN.items():
        try:
            expected = reference_run(subject, params, reference)(grads)
        except Exception:  # it does not take these hyperparameters
            continue
        if parting(expected, found) is None:
            return name, reference
    return None


def trusted(subject: OptimizerSubject) -> tuple[str, Callable[..., Any]] | None:
    """(name, reference): the one that was given, else the rule that it was recognised as."""
    if subject.reference is not None:
        return spelled(subject.reference), subject.reference
    if "textbook" not in subject.facts:
        subject.facts["textbook"] = recognised(subject)
    return subject.facts["textbook"]
