"""Casts of weights under autocast, each made once: as torch does it for its own operations.

A leaf that needs a gradient is cast the first time that it is used under ``torch.autocast``, and the copy serves until the
outermost context is left: one copy in memory, one cast, and one node through which all its gradients come back.

torch does not say when its own cache is cleared. But it does clear it, and so ours is hung upon a cast in there: the dict of
our casts is metadata of that cast's node in the graph, and held by nothing else.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.nn import Parameter

__all__ = ["cast", "lowered"]


class Casts(dict[tuple[int, torch.dtype], tuple[Tensor, int, Tensor]]):
    """(id of a weight, dtype) to the weight, its version, and the cast."""


def _nothing() -> Casts | None:
    return None


_lock = threading.Lock()
_casts: Any = _nothing  # a weak reference


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the dtype of autocast, which is on for its device.

    >>> w = torch.ones(2, 2, requires_grad=True)
    >>> with torch.autocast("cpu"):
    ...     cast(w, torch.bfloat16) is cast(w, torch.bfloat16)
    True
    """
    if (
        x.dtype != torch.float32
        or not x.requires_grad
        or not x.is_leaf
        or type(x) not in (Tensor, Parameter)
        or x._is_view()
        or not torch.is_grad_enabled()
        or not torch.is_autocast_cache_enabled()
        or _len_torch_dispatch_stack()
    ):
        return x.to(dtype)
    casts = _casts() or _new_casts(x.device)
    key = id(x), dtype
    found = casts.get(key)
    if found is None or found[0] is not x or found[1] != x._version:
        found = casts[key] = x, x._version, x.to(dtype)
    return found[2]


def _new_casts(device: torch.device) -> Casts:
    """Empty, and alive until torch clears its cache."""
    global _casts
    with _lock:
        casts: Casts | None = _casts()
        if casts is None:
            leaf = torch.zeros(1, 1, device=device, requires_grad=True)
            node = torch.mm(leaf, leaf).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
            casts = Casts()
            node.metadata["torchcalc"] = casts  # type: ignore[union-attr, index]
            _casts = weakref.ref(casts)
    return casts


def lowered(tensors: Iterable[Tensor | None], device_type: str) -> list[Any]:
    """In the dtype of autocast, as torch's matrix products take them: float64, and what holds no floats, stays.

    >>> with torch.autocast("cpu"):
    ...     [x.dtype for x in lowered([torch.ones(2), torch.ones(2, dtype=torch.float64)], "cpu")]
    [torch.bfloat16, torch.float64]
    """
    low = torch.get_autocast_dtype(device_type)
    return [x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else cast(x, low) for x in tensors]
