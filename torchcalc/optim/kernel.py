"""Kernels made from rules: which there are, and a step by one of them.

When the kernels are built, the rule of every optimizer is recorded (:mod:`torchcalc.formula.rule`), once for each combination of
the options that the class names in ``variants``; each recording becomes a kernel that carries its hash. At run time the
rule is recorded as the group's options have it, and the kernel with that hash is the one that computes the same. A rule that was
edited since, or that someone else wrote, has no kernel, and is run itself.

A kernel takes the rule's numbers in this order: what :meth:`Optimizer.advance` returns for each tensor, then those of
:meth:`Optimizer.hyper`. Where ``advance`` is the usual one, which counts steps, the kernel counts them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchcalc.formula.rule import Recording, is_number, record
from torchcalc.native.optim import UNSUPPORTED, Bound
from torchcalc.optim.extras import Scaling

if TYPE_CHECKING:
    from torchcalc.optim.optimizer import Optimizer

__all__ = ["all_recordings", "may_have_kernel", "recordings", "step"]

Key = tuple[Any, ...]

_found: dict[Key, int | None] = {}  # by all that a rule may branch on; None where the library has no such kernel
_without: set[Key] = set()  # optimizers' rules and options that have no kernel


def step(
    optimizer: Optimizer,
    bound: Bound,
    states: Sequence[dict[str, Any]],
    grads: list[Tensor],
    group: dict[str, Any],
    first: Sequence[int],
    scaling: Scaling,
    counts: bool,
) -> tuple[int, list[dict[str, Any]] | None]:
    """One step of all tensors at once.

    Args:
        counts: nothing differs between tensors but their step count, which the kernel raises.

    Returns:
        The status, as in :mod:`torchcalc.native.optim`; and what ``advance`` has returned for each tensor, if it was called:
        where the status is not `DONE` the rule goes on with it.
    """
    hyper = optimizer.hyper(group)
    slots = tuple(optimizer.slots(group))
    owns, scalars = None, []
    if counts:
        own: dict[str, Any] = {"t": 1.0} if optimizer.counts_steps else {}
    else:
        if bound.refused(grads):
            return UNSUPPORTED, None  # before anything is counted: the rule may raise
        new = set(first)
        owns = [optimizer.advance(state, group, hyper, i in new) for i, state in enumerate(states)]
        own, way = owns[0], _way(owns[0])
        for other in owns:
            scalars += _numbers(other)
            if len(own) != len(other) or way != _way(other):
                return UNSUPPORTED, owns  # they go different ways through the rule
        hyper = {name: x for name, x in hyper.items() if name not in own}
    number = find(optimizer.rule, slots, own, hyper)
    if number is None:
        _without.add((optimizer.rule, slots, *_way(optimizer.hyper(group))))
        return UNSUPPORTED, owns
    status = bound.rule_(
        grads,
        hash=number,
        counts=counts and optimizer.counts_steps,
        scalars=scalars,
        shared=_numbers(hyper),
        maximize=group["maximize"],
        grad_coef=float(scaling.coefficient),
        grad_scale=scaling.grad_scale,
        seed=scaling.seed,
    )
    return status, owns


def may_have_kernel(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether it is not known by now that the rule has no kernel for these options."""
    if not _without:
        return True
    return (optimizer.rule, tuple(optimizer.slots(group)), *_way(optimizer.hyper(group))) not in _without


def find(rule: Callable[..., None], slots: tuple[str, ...], own: dict[str, Any], shared: dict[str, Any]) -> int | None:
    """The number of the kernel that computes what the rule does with these arguments."""
    key = (rule, slots, *own, *shared, *_way(own), *_way(shared))
    if key not in _found:
        _found[key] = None
        try:
            number = record(rule, slots, {**own, **shared}).number
        except Exception:  # whatever a rule does that cannot be recorded: it runs as it is
            return None
        if torch.ops.torchcalc.has_rule.default(number):
            _found[key] = number
    return _found[key]


def _way(arguments: dict[str, Any]) -> list[Any]:
    """All that decides how a rule goes: flags, and which numbers are zero."""
    return [(x != 0.0) if type(x) is float else bool(x != 0) if is_number(x) else (x,) for x in arguments.values()]


def _numbers(arguments: dict[str, Any]) -> list[float]:
    return [x if type(x) is float else float(x) for x in arguments.values() if type(x) is float or is_number(x)]


# At build.


def recordings(cls: type[Optimizer]) -> list[Recording]:
    """Of the rule, with each combination of ``cls.variants`` that the class accepts."""
    found: dict[str, Recording] = {}
    for values in itertools.product(*cls.variants.values()):
        p = torch.nn.Parameter(torch.ones(1, device="cpu"))
        p.grad = torch.ones_like(p)
        try:
            optimizer = cls([p], **dict(zip(cls.variants, values, strict=True)))
        except ValueError:  # options that do not go together
            continue
        (group,) = optimizer.param_groups
        slots = tuple(optimizer.slots(group))
        with torch.no_grad():
            (entry,) = optimizer._entries(group, [p])
            hyper = optimizer.hyper(group)
            for first in (True, False):
                own = optimizer.advance(entry.state, group, hyper, first)
                new = record(cls.rule, slots, {**own, **{k: x for k, x in hyper.items() if k not in own}})
                found[new.hash] = new
    return list(found.values())


def all_recordings() -> dict[str, list[Recording]]:
    """Of all optimizers in torchcalc.optim that have a rule, by their rule's name; each once."""
    import torchcalc.optim as optim
    from torchcalc.optim.optimizer import Optimizer

    found: dict[str, dict[str, Recording]] = {}
    for name in optim.__all__:
        cls = getattr(optim, name)
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer:
            for recording in recordings(cls):
                found.setdefault(recording.name, {})[recording.hash] = recording
    return {name: list(each.values()) for name, each in found.items()}
