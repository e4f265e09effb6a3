"""The fast way of a step on CPU: one kernel call per group, over all its tensors at once.

Most of what a step asks does not change between steps: which parameters have a gradient, which tensors are their state,
whether a kernel takes them. A :class:`Plan` remembers the answers, and checks at each step, by identity, that they
still hold; the driver keeps one for each set of parameters that has had gradients of late. What tensors hold (a moved
parameter, a gradient of other strides) is checked by the kernel itself before it writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from torchcalc import native
from torchcalc.native import pointwise
from torchcalc.native.optim import DONE, Bound

__all__ = ["DONE", "Plan", "Remembered", "is_wanted", "leaves_the_choice"]

PLAIN = (Tensor, torch.nn.Parameter)


def leaves_the_choice(group: dict[str, Any]) -> bool:
    """Whether the group's options leave the way of its step on CPU to us."""
    return (
        group["foreach"] is None
        and group.get("fused") in (None, True)
        and not group["differentiable"]
        and not group.get("capturable")
        and not torch.compiler.is_compiling()
    )


def is_wanted(group: dict[str, Any]) -> bool:
    """Whether the group's options leave the choice, and kernels are there; a warning, the first time that they are not."""
    return leaves_the_choice(group) and (native.available() or native.warn_once(group["params"]))


class Remembered:
    """Parameters of a group and the tensors of their state, as one step has found them."""

    def __init__(self, entries: list[Any], keys: tuple[str, ...], counts_steps: bool) -> None:
        """Entries of all parameters with a gradient; the state keys of the slots."""
        self.keys = keys
        keys = (*keys, "step") if counts_steps else keys
        self.read = itemgetter(*keys) if len(keys) > 1 else lambda state: [state[k] for k in keys]
        self.states = [e.state for e in entries]
        self.count = len(entries)
        self.objects = list(self._objects([e.p for e in entries]))

    def _objects(self, params: list[Tensor]) -> Iterable[Any]:
        return chain(params, chain.from_iterable(map(self.read, self.states)))

    def holds(self, params: list[Tensor], keys: tuple[str, ...]) -> bool:
        """Whether these are still the parameters with a gradient, the slots, and what is in them."""
        try:
            return (
                keys == self.keys and len(params) == self.count and all(map(is_, self._objects(params), self.objects))
            )
        except KeyError:  # a slot was deleted
            return False


class Plan(Remembered):
    """Which parameters of a group a kernel steps, bound to their state; and which are left to the rule.

    Where the nodes are built, they look at all that is remembered, and what is bound are aliases of the parameters: then nobody
    but its owner holds a parameter, whom ``module.to()`` may ask to swap it.
    """

    def __init__(self, entries: list[Any], keys: tuple[str, ...], counts_steps: bool, params: list[Tensor]) -> None:
        """params: all of the group."""
        super().__init__(entries, keys, counts_steps)

        def bind(places: list[int], alias: bool) -> Bound:
            ours = [entries[i] for i in places]
            slots = list(chain.from_iterable(zip(*(e.slots for e in ours), strict=True)))
            steps = [e.state["step"] for e in ours] if counts_steps else []
            return Bound([e.p.detach() if alias else e.p for e in ours], slots, steps)

        tensors = [(e.p, e.g, *self.read(e.state)) for e in entries]
        shared = _sharing(tensors)
        self.places = [i for i, each in enumerate(tensors) if i not in shared and all(type(t) in PLAIN for t in each)]
        nodes = pointwise.rows() if len(self.places) == len(entries) else None
        self.bound = bind(self.places, nodes is not None)
        if refused := self.bound.refused([entries[i].g for i in self.places]):
            nodes = None
            self.places = [i for k, i in enumerate(self.places) if k not in refused]
            self.bound = bind(self.places, False)
        self.watch: Any = None
        if nodes is not None:
            states = {id(e.p): e.state for e in entries}
            with_step = (*keys, "step") if counts_steps else keys
            self.watch = nodes.watch(params, [states.get(id(p)) for p in params], with_step, len(keys), False)
        self.kernel_states = [self.states[i] for i in self.places]
        self.rest = sorted(set(range(len(entries))) - set(self.places))
        self.looks = [_look(entries[i].p) for i in self.rest]

    def still_holds(self, params: list[Tensor], found: list[Tensor], keys: tuple[str, ...]) -> bool:
        """Whether all that is remembered is as it was, and what the kernel did not take.

        Args:
            params: all of the group.
            found: those that have a gradient.
        """
        if self.watch is not None:
            return keys == self.keys and bool(pointwise.rows().holds(self.watch, params))
        return self.holds(found, keys) and (not self.rest or self.looks == [_look(found[i]) for i in self.rest])


def _sharing(tensors: list[tuple[Tensor, ...]]) -> set[int]:
    """The places of those parameters, (p, g, *state), that share memory with another: a kernel takes none beside them."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), place)
        for place, (p, _, *state) in enumerate(tensors)
        for t in (p, *state)
        if type(t) in PLAIN and t.layout == torch.strided and t.numel()
    )
    shared: set[int] = set()
    end, owner = 0, 0
    for start, stop, place in spans:
        if start < end:
            shared |= {owner, place}
        if stop > end:
            end, owner = stop, place
    return shared


def _look(p: Tensor) -> list[Any]:
    """What a kernel that did not take p, with its gradient, may have minded: it is asked again once this changes."""
    return [
        (type(t), t.dtype, t.device, t.layout, t.stride() if t.layout == torch.strided else None)
        for t in (p, p.grad)
        if t is not None
    ]
