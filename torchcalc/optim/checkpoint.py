"""Loading a state dict: what torch does, without what goes wrong there.

- Parameters are found by name where both sides know names (``param_names``), else by place.
- A state dict that does not fit is refused before anything is changed: hyperparameters that it lacks, those of another
  optimizer, a slot that is missing or has another shape than its parameter. torch takes it, and goes on from numbers
  that were never learnt, or raises at the next step. ``strict=False`` leaves out what does not fit, and says what.
- State tensors are copied. torch keeps those that are already on the device and of the dtype, so that two optimizers
  which loaded one checkpoint step each other's state.
- State is not rounded to half precision. torch casts it to its parameter's dtype: float32 averages of a bfloat16 weight
  are lost.
- ``foreach``, ``fused``, ``capturable`` and ``differentiable`` stay as the constructor was told: they say how this
  process computes, not what was learnt.

The format is torch's, so that checkpoints load both ways.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchcalc.optim.checks import level_of_caller

if TYPE_CHECKING:
    from torchcalc.optim.optimizer import Optimizer

HOW = ("foreach", "fused", "capturable", "differentiable")
SCALARS = ("step", "mu_product", "eta", "mu")

#: Parts of a parameter's name that wrappers of its module put there.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

MOST_FAULTS_SHOWN = 5

Group = dict[str, Any]


def load_state_dict(optimizer: Optimizer, state_dict: dict[str, Any], *, strict: bool = True) -> None:
    """``optimizer.load_state_dict(state_dict, strict=strict)``."""
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        result = pre_hook(optimizer, state_dict)
        if result is not None:
            state_dict = result

    faults: list[str] = []
    saved_groups = deepcopy(state_dict["param_groups"])
    state: defaultdict[Any, dict[Any, Any]] = defaultdict(dict)
    param_groups = []
    for i, (group, saved) in enumerate(_pairs(optimizer.param_groups, saved_groups, faults)):
        if saved is None:
            param_groups.append(group)
            _keep(optimizer, group["params"], state)
            continue
        loaded = _loaded_group(optimizer, i, group, saved, faults)
        param_groups.append(loaded)
        for label, p, saved_id in _matches(i, group, saved, faults):
            value = state_dict["state"].get(saved_id)
            if saved_id is None or (value and not _fits(optimizer, loaded, label, p, value, faults)):
                _keep(optimizer, [p], state)
            elif value is not None:
                state[p] = _copied(value, p, loaded)
    if faults and strict:
        raise ValueError(
            _report(faults) + "\nNothing was changed. load_state_dict(..., strict=False) leaves these out."
        )
    ours = {key for saved in saved_groups for key in saved["params"]}
    for key, value in state_dict["state"].items():
        if key not in ours:
            state.setdefault(key, value)

    optimizer.__setstate__({"state": state, "param_groups": param_groups})
    if faults:
        warnings.warn(
            f"load_state_dict(strict=False) left out what does not fit:\n{_report(faults)}",
            UserWarning,
            stacklevel=level_of_caller(),
        )
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _report(faults: list[str]) -> str:
    shown, rest = faults[:MOST_FAULTS_SHOWN], len(faults) - MOST_FAULTS_SHOWN
    return "\n".join([*shown, f"... and {rest} more"] if rest > 0 else shown)


def _keep(optimizer: Optimizer, params: list[Tensor], state: dict[Any, dict[Any, Any]]) -> None:
    """strict=False: a parameter that is left out keeps the state that it has."""
    for p in params:
        if p in optimizer.state:
            state[p] = optimizer.state[p]


# Which group and which parameter a saved one is.


def _pairs(groups: list[Group], saved_groups: list[Group], faults: list[str]) -> list[tuple[Group, Group | None]]:
    """Each group with the saved one of the same names; or, unless each has one, of the same place."""
    if len(groups) != len(saved_groups):
        faults.append(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, but the optimizer has {len(groups)}; build it with the groups it was saved with"
        )
    by_names = {frozenset(names): saved for saved in saved_groups if (names := _names(saved))}
    found = [by_names.get(frozenset(_names(group))) for group in groups]
    if len(by_names) == len(saved_groups) == len(groups) and None not in found:
        return list(zip(groups, found, strict=True))
    missing: list[Group | None] = [None] * (len(groups) - len(saved_groups))
    return list(zip(groups, [*saved_groups, *missing], strict=False))


def _matches(i: int, group: Group, saved: Group, faults: list[str]) -> list[tuple[str, Tensor, Any]]:
    """(its name in a message, the parameter, its key in the saved state or None) for all parameters of a group."""
    params, keys = group["params"], saved["params"]
    labels = group.get("param_names") or [f"parameter {k} of group {i}" for k in range(len(params))]
    names, saved_names = _names(group), _names(saved)
    by_name = bool(names and saved_names and len(saved_names) == len(keys))
    missing = [x for x in names if x not in saved_names] if by_name else []
    unknown = [x for x in saved_names if x not in names] if by_name else []
    if len(params) != len(keys):
        faults.append(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: group "
            f"{i} has {len(keys)} parameters, but the optimizer's {len(params)}{_difference(missing, unknown)}"
        )
        if not by_name:
            keys = [None] * len(params)
    elif missing:
        faults.append(
            f"the names of the parameters of group {i} differ{_difference(missing, unknown)}; delete 'param_names' from "
            "the state dict's groups to load them in their order"
        )
    if by_name:
        key_of = dict(zip(saved_names, keys, strict=True))
        keys = [key_of.get(name) for name in names]
    return list(zip(labels, params, keys, strict=True))


def _difference(missing: list[str], unknown: list[str]) -> str:
    told = [
        f"{what} {', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''}"
        for what, names in (("the state dict lacks", missing), ("the optimizer has no", unknown))
        if names
    ]
    return f": {', and '.join(told)}" if told else ""


def _names(group: Group) -> list[str]:
    """The names of its parameters without what wrappers add; [] if unknown."""
    names: list[str] = list(group.get("param_names") or [])
    plain = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]
    return plain if len(set(plain)) == len(plain) else names


# Whether it fits.


def _loaded_group(optimizer: Optimizer, i: int, group: Group, saved: Group, faults: list[str]) -> Group:
    """The group with the saved hyperparameters."""
    lacks = optimizer.defaults.keys() - saved.keys() - set(HOW)
    later = list(optimizer.added_later)
    youngest = max((k for k, key in enumerate(later) if key in saved), default=-1)
    old = {key: optimizer.added_later[key] for key in later[youngest + 1 :] if key in lacks}
    kept = {key: group[key] for key in sorted(lacks - old.keys())}
    foreign = _hyperparameters_of_others(tuple(cls.__name__ for cls in type(optimizer).__mro__))
    others = sorted((saved.keys() & foreign) - optimizer.defaults.keys() - group.keys())
    cls = type(optimizer).__name__
    if kept:
        own = ", ".join(f"{key} (the optimizer has {value!r})" for key, value in kept.items())
        faults.append(f"group {i} of the state dict lacks what {cls} needs: {own}")
    if others:
        told = ", ".join(f"{key}={saved[key]!r}" for key in others)
        faults.append(f"group {i} of the state dict is another optimizer's: {cls} does not have its {told}")
    learnt = {key: value for key, value in saved.items() if key not in (*HOW, *others)}
    names = {"param_names": group.get("param_names", saved.get("param_names"))}
    how = {key: group[key] for key in HOW if key in group}
    return {**old, **kept, **learnt, **(names if names["param_names"] else {}), **how, "params": group["params"]}


@functools.cache
def _hyperparameters_of_others(own: tuple[str, ...]) -> frozenset[str]:
    """Arguments of torch's optimizers that those of these names do not have. Other keys of a group are its user's."""

    arguments = {
        cls.__name__: inspect.signature(cls).parameters.keys()
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    mine = set(HOW).union(*(arguments.get(name, ()) for name in own))
    return frozenset(set().union(*arguments.values()) - mine)


def _fits(optimizer: Optimizer, group: Group, label: str, p: Tensor, value: Any, faults: list[str]) -> bool:
    """Whether a saved state is one that this optimizer would have made for p."""
    if not isinstance(value, dict):
        return True
    slots = list(optimizer.slots(group).values())
    scalars = list(optimizer.scalars) if optimizer.counts_steps else []
    needed = [*slots, *scalars]
    lacks = [key for key in needed if key not in value]
    before = len(faults)
    if lacks and len(lacks) < len(needed):
        faults.append(f"the state of {label} lacks {lacks}; expected {sorted(needed)}, found {sorted(map(str, value))}")
    for key in slots:
        found = value.get(key)
        if found is not None and getattr(found, "shape", None) != p.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else repr(found)
            faults.append(f"{key} of {label}: expected the parameter's shape {tuple(p.shape)}, found {shape}")
    for key in scalars:
        found = value.get(key)
        if isinstance(found, Tensor) and found.numel() != 1:
            faults.append(f"{key} of {label}: expected one number, found shape {tuple(found.shape)}")
    return len(faults) == before


# Its values.


def _copied(value: Any, p: Tensor, group: dict[str, Any], key: Any = None) -> Any:
    """A deep copy on the device where the state belongs; part of the graph of the value if the step is recorded."""
    if isinstance(value, Tensor):
        if not group.get("differentiable"):
            value = value.detach()
        if value.dim() == 0 and key in SCALARS:
            on_device = group.get("capturable") or group.get("fused")
            return value.to(p.device if on_device else "cpu", torch.float32 if on_device else value.dtype, copy=True)
        return value.to(p.device, state_dtype(value, p), copy=True)
    if isinstance(value, dict):
        return {k: _copied(v, p, group, k) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return type(value)(_copied(v, p, group) for v in value)  # type: ignore[call-arg]
    if key in SCALARS:  # checkpoints of old have numbers here
        return _copied(torch.tensor(float(value), dtype=torch.float32, device="cpu"), p, group, key)
    return value


def state_dtype(value: Tensor, p: Tensor) -> torch.dtype:
    """The dtype in which p's state is kept: p's own, or float32 where p is narrower and the state was not.

    float64 state of a narrower parameter is rounded to float32: its error of 6e-8 is below that of a step in float32.
    """
    if not (value.is_floating_point() and p.is_floating_point()):
        return value.dtype
    value_dtype = torch.float32 if value.dtype == torch.float64 else value.dtype
    return torch.promote_types(value_dtype, p.dtype)
