"""Loading a state dict: what torch does, without three of its defects.

- State tensors are copied. torch keeps those that are already on the device and of the dtype, so that two optimizers
  which loaded one checkpoint step each other's state.
- State is never rounded. torch casts it to its parameter's dtype: float32 averages of a bfloat16 weight are lost.
- ``foreach``, ``fused``, ``capturable`` and ``differentiable`` stay as the constructor was told: they say how this
  process computes, not what was learnt.

The format is torch's, so that checkpoints load both ways.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

HOW = ("foreach", "fused", "capturable", "differentiable")
SCALARS = ("step", "mu_product", "eta", "mu")


def load_state_dict(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state_dict)``.

    Raises:
        ValueError: the groups of the state dict do not match the optimizer's; nothing is changed then.
    """
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = pre_hook(optimizer, state_dict)
        if result is not None:
            state_dict = result

    groups, saved_groups = optimizer.param_groups, deepcopy(state_dict["param_groups"])
    if len(groups) != len(saved_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, but the optimizer has {len(groups)}; build it with the groups it was saved with"
        )
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: group "
                f"{i} has {len(saved['params'])} parameters, but the optimizer's {len(group['params'])}"
            )

    owner = {
        saved_id: (p, group)
        for group, saved in zip(groups, saved_groups, strict=True)
        for saved_id, p in zip(saved["params"], group["params"], strict=True)
    }
    state: defaultdict[Any, dict[Any, Any]] = defaultdict(dict)
    for key, value in state_dict["state"].items():
        if key in owner:
            p, group = owner[key]
            state[p] = _copied(value, p, group)
        else:
            state[key] = value

    def merged(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        own = {k: group[k] for k in (*HOW, "params") if k in group}
        names = {k: group[k] for k in ("param_names",) if k in group}
        return {**names, **saved, **own}

    param_groups = [merged(group, saved) for group, saved in zip(groups, saved_groups, strict=True)]
    optimizer.__setstate__({"state": state, "param_groups": param_groups})
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _copied(value: Any, p: Tensor, group: dict[str, Any], key: Any = None) -> Any:
    """A deep copy on the device where the state belongs."""
    if isinstance(value, Tensor):
        if value.dim() == 0 and key in SCALARS:
            on_device = group.get("capturable") or group.get("fused")
            return value.detach().to(
                p.device if on_device else "cpu", torch.float32 if on_device else value.dtype, copy=True
            )
        return value.to(p.device, _unrounded(value, p), copy=True)
    if isinstance(value, dict):
        return {k: _copied(v, p, group, k) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return type(value)(_copied(v, p, group) for v in value)  # type: ignore[call-arg]
    if key in SCALARS:  # checkpoints of old have numbers here
        return torch.tensor(float(value), dtype=torch.float32)
    return value


def _unrounded(value: Tensor, p: Tensor) -> torch.dtype:
    """The parameter's dtype, as torch has it, but never a narrower one than the value's own."""
    if value.is_floating_point() and p.is_floating_point():
        return torch.promote_types(value.dtype, p.dtype)
    return value.dtype
