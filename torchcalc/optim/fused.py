"""torch's own fused operations on CPU, for where our kernels are not built: one pass over each tensor, where the rule's
operations make five to fifteen.

They are right for less than they accept, so an entry is handed to them only where they are: plain contiguous (or
channels_last) tensors, since they ignore strides; float32 and float64, since SGD in half types leaves blocks unchanged (torch
2.13); a gradient taken as it is, since they write the unscaled one over ``p.grad``. Everything else goes by the rule.
"""

from __future__ import annotations

from collections import defaultdict
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchcalc.optim.extras import NORMAL, Scaling
from torchcalc.optim.native import PLAIN, Remembered

if TYPE_CHECKING:
    from torchcalc.optim.optimizer import Entry, Optimizer

__all__ = ["Plan", "step"]

DTYPES = (torch.float32, torch.float64)

# These operations write where autograd does not see it.
_written = torch._C._increment_version


class Plan(Remembered):
    """The tensors of a group of which torch's operation took all: the next step looks at them all at once."""

    def __init__(self, entries: list[Entry], keys: tuple[str, ...], counts_steps: bool) -> None:
        super().__init__(entries, keys, counts_steps)
        self.params = [e.p for e in entries]
        self.slots = [list(column) for column in zip(*(e.slots for e in entries), strict=True)]
        self.steps = [e.state["step"] for e in entries] if counts_steps else []
        self.tensors = [*self.params, *(t for slot in self.slots for t in slot)]

    def takes(self, grads: list[Tensor]) -> bool:
        """What `are_taken` asks of each parameter, of all together."""
        tensors = [*self.tensors, *grads]
        if not (_plain.issuperset(map(type, tensors)) and all(map(_is_cpu, tensors))):
            return False
        dtypes = set(map(_dtype, tensors))
        return (
            len(dtypes) == 1
            and dtypes <= _dtypes
            and _layouts.issuperset(map(_layout, tensors))
            and all(map(Tensor.is_contiguous, tensors))
            and len(set(map(_place, map(Tensor.untyped_storage, tensors)))) == len(tensors)
        )

    def step(self, optimizer: Optimizer, group: dict[str, Any], grads: list[Tensor]) -> None:
        _run(optimizer, group, self.params, grads, self.slots, self.steps, False)


_plain, _dtypes, _layouts = set(PLAIN), set(DTYPES), {torch.strided}
_is_cpu, _dtype, _layout = attrgetter("is_cpu"), attrgetter("dtype"), attrgetter("layout")
_place = torch.UntypedStorage.data_ptr


def _run(
    optimizer: Optimizer,
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    slots: list[list[Tensor]],
    steps: list[Tensor],
    first: bool,
) -> None:
    assert optimizer.torch_fused is not None
    if steps:
        torch._foreach_add_(steps, 1)
    optimizer.torch_fused(params, grads, slots, steps, group, first)
    _written([*params, *(t for slot in slots for t in slot)])
    optimizer._stepped(params)


def step(optimizer: Optimizer, group: dict[str, Any], entries: list[Entry], scaling: Scaling) -> list[Entry]:
    """Step those entries that torch's operation takes, and return the others."""
    if scaling is not NORMAL:
        return entries
    buckets: dict[Any, list[Entry]] = defaultdict(list)
    rest = []
    for e in entries:
        tensors = [e.p, e.g, *e.slots]
        if are_taken(tensors) and ("step" not in e.state or is_plain(e.state["step"])):
            buckets[e.p.dtype, e.first].append(e)
        else:
            rest.append(e)
    for (_, first), taken in buckets.items():
        params, grads, *slots = map(list, zip(*([e.p, e.g, *e.slots] for e in taken), strict=True))
        steps = [e.state["step"] for e in taken] if optimizer.counts_steps else []
        _run(optimizer, group, params, grads, slots, steps, first)
    return rest


def are_taken(tensors: list[Tensor]) -> bool:
    """Whether the operation is right for [p, g, *slots]."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or not all(is_plain(t) and t.dtype == dtype for t in tensors):
        return False
    if len({t.untyped_storage().data_ptr() for t in tensors}) < len(tensors):
        return False  # one may overlap another
    return all(t.is_contiguous() for t in tensors) or all(
        t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in tensors
    )


def is_plain(t: Tensor) -> bool:
    return type(t) in PLAIN and t.is_cpu and t.layout == torch.strided
