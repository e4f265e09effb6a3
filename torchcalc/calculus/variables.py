"""What derivatives are taken by: a real float tensor, or a dict of them; and what must be like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map, tree_unflatten

__all__ = ["Tensors", "like", "named", "real"]

Tensors = Tensor | Mapping[str, Tensor]


def real(x: Any, name: str = "x") -> Any:
    """x with numbers made tensors; raise unless all that is in it is real and float."""
    leaves, structure = _leaves(x)
    found = []
    for path, t in leaves:
        t = torch.tensor(float(t)) if isinstance(t, (int, float)) else t
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}{path}: a {type(t).__name__}; pass a float tensor, or a dict of them")
        if not t.is_floating_point():
            raise TypeError(
                f"{name}{path}: {t.dtype} is no real variable; pass it as float (or its real and imaginary part)"
            )
        found.append(t)
    return tree_unflatten(found, structure)


def named(x: Any, name: str) -> dict[str, Tensor]:
    """A dict of tensors as it is, a tensor under the name ''; real, float and detached."""
    tree = real(dict(x) if isinstance(x, Mapping) else x, name) if isinstance(x, (Tensor, Mapping)) else None
    tensors = {"": tree} if isinstance(tree, Tensor) else tree
    if not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise TypeError(f"{name}: a {type(x).__name__}; pass a tensor or a dict of tensors, not an empty one")
    return {k: t.detach() for k, t in tensors.items()}


def like(v: Any, x: Any, name: str = "v", of: str = "x") -> Any:
    """v in the structure, the order and the dtypes of x; raise unless it is real and its shapes are those of x."""
    leaves, structure = _leaves(x)
    found = dict(_leaves(v)[0])
    if {k: _shape(t) for k, t in found.items()} != {k: _shape(t) for k, t in leaves}:
        raise ValueError(f"{name}: its shapes are {tree_map(_shape, v)}; those of {of} are {tree_map(_shape, x)}")
    for path, t in found.items():
        if isinstance(t, Tensor) and t.is_complex():
            raise TypeError(f"{name}{path}: {t.dtype} is not real; pass its real and its imaginary part by themselves")
    return tree_unflatten([torch.as_tensor(found[k], dtype=t.dtype, device=t.device) for k, t in leaves], structure)


def _leaves(x: Any) -> tuple[list[tuple[str, Any]], Any]:
    leaves, structure = tree_flatten_with_path(x)
    return [(keystr(path), t) for path, t in leaves], structure


def _shape(t: Any) -> Any:
    return tuple(t.shape) if isinstance(t, Tensor) else () if isinstance(t, (int, float)) else type(t).__name__
