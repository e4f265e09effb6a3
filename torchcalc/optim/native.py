"""The fast way of a step on CPU: one kernel call per group, over all its tensors at once.

Most of what a step asks does not change between steps: which parameters have a gradient, which tensors are their state,
whether a kernel takes them. A :class:`Plan` remembers the answers, and checks at each step, by identity, that they
still hold. What tensors hold (a moved parameter, a gradient of other strides) is checked by the kernel itself before
it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from torchcalc import native
from torchcalc.native.optim import DONE, Bound

__all__ = ["DONE", "Plan", "fits", "is_wanted"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_wanted(group: dict[str, Any]) -> bool:
    """Whether the group's options leave the choice, and kernels are there."""
    return (
        group["foreach"] is None
        and group.get("fused") in (None, True)
        and not group["differentiable"]
        and not group.get("capturable")
        and not torch.compiler.is_compiling()
        and native.available()
    )


def fits(tensors: list[Tensor]) -> bool:
    """Whether a kernel takes [p, g, *slots]: plain dense CPU tensors of equal strides."""
    p = tensors[0]
    return (
        p.dtype in DTYPES
        and tensors[1].dtype == p.dtype
        and all(
            type(t) in (Tensor, torch.nn.Parameter)
            and t.is_cpu
            and t.layout == torch.strided
            and t.shape == p.shape
            and t.stride() == p.stride()
            and t.dtype in (p.dtype, torch.float32)
            for t in tensors
        )
        and is_dense(p)
    )


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order of the dimensions."""
    expected = 1
    for size, stride in sorted(zip(t.shape, t.stride(), strict=True), key=itemgetter(1)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


class Plan:
    """Which parameters of a group a kernel steps, bound to their state; and which are left to the rule."""

    def __init__(self, entries: list[Any], state: dict[Tensor, Any], keys: tuple[str, ...], counts_steps: bool) -> None:
        """Entries of all parameters with a gradient; the optimizer's state; the state keys of the slots."""
        params = [e.p for e in entries]
        self.places = [i for i, e in enumerate(entries) if fits([e.p, e.g, *e.slots])]
        self.rest: Sequence[int] = sorted(set(range(len(entries))) - set(self.places))
        ours = [entries[i] for i in self.places]
        slots = list(chain.from_iterable(zip(*(e.slots for e in ours), strict=True)))
        self.bound = Bound([e.p for e in ours], slots, [e.state["step"] for e in ours] if counts_steps else [])

        self.keys = keys
        keys = (*keys, "step") if counts_steps else keys
        self.read = itemgetter(*keys) if len(keys) > 1 else lambda state: [state[k] for k in keys]
        self.states = [e.state for e in entries]
        self.counts = len(params), len(state)
        self.objects = list(self._objects(params, state))

    def _objects(self, params: list[Tensor], state: dict[Tensor, Any]) -> Iterable[Any]:
        return chain(params, state.values(), chain.from_iterable(map(self.read, self.states)))

    def holds(self, params: list[Tensor], state: dict[Tensor, dict[str, Any]], keys: tuple[str, ...]) -> bool:
        """Whether these are still the parameters with a gradient, the slots, and the plan's tensors their state."""
        try:
            return (
                keys == self.keys
                and (len(params), len(state)) == self.counts
                and all(map(is_, self._objects(params, state), self.objects))
            )
        except KeyError:  # a slot was deleted
            return False
