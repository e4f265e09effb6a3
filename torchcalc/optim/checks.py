"""Checks of hyperparameters, before anything is changed: torch's exception and words first, then the remedy."""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from numbers import Real
from typing import Any

from torch import Tensor

__all__ = [
    "check_at_least_zero",
    "check_betas",
    "check_finite",
    "check_implementation",
    "check_numbers",
    "check_one_element",
    "check_tensor_betas",
    "check_tensor_lr",
    "level_of_caller",
    "warn_of_misspelling",
]


PYTHONS = frozenset((bool, int, float))


def check_one_element(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"Tensor {name} must be 1-element, but its shape is {tuple(value.shape)}; pass torch.tensor(0.1)"
        )


def check_numbers(index: int, hyper: dict[str, Any]) -> None:
    """Before every step: a rule must not fail at a hyperparameter once another group has been stepped.

    Whether the number makes sense is checked where it is given to the optimizer; schedulers may set what they like.
    """
    if PYTHONS.issuperset(map(type, hyper.values())):
        return
    for name, x in hyper.items():
        if not (x.numel() == 1 if isinstance(x, Tensor) else isinstance(x, Real)):
            raise TypeError(f"{name} of parameter group {index} is {x!r}; it must be a number or a 1-element tensor")


def check_at_least_zero(what: str, value: Any) -> None:
    """What is 'learning rate', 'epsilon value', ... Unlike torch's, this refuses nan and inf."""
    if not (0.0 <= value and _is_finite(value)):
        raise ValueError(f"Invalid {what}: {value}; it must be a finite number >= 0")


def check_finite(what: str, value: Any) -> None:
    if not _is_finite(value):
        raise ValueError(f"Invalid {what}: {value}; it must be a finite number")


def _is_finite(value: Any) -> bool:
    return math.isfinite(value.detach() if isinstance(value, Tensor) else value)


def check_betas(betas: Any) -> None:
    for i in (0, 1):
        if not 0.0 <= betas[i] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}; it must be in [0, 1)")
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas}; they are two, e.g. (0.9, 0.999)")


def check_tensor_lr(group: dict[str, Any]) -> None:
    """What Adam says about lr as a tensor."""
    if isinstance(group["lr"], Tensor):
        check_not_foreach("lr", group)


def check_tensor_betas(group: dict[str, Any]) -> None:
    """What Adam says about betas as tensors. Numbers may be int, which torch's constructor refuses."""
    betas = group["betas"]
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be either both floats or both Tensors, but are {betas}; convert one of them")
    for i, b in enumerate(betas):
        if isinstance(b, Tensor):
            check_not_foreach(f"betas[{i}]", group)
            check_one_element(f"betas[{i}]", b)


def check_not_foreach(name: str, group: dict[str, Any]) -> None:
    if group["foreach"] and not group["capturable"]:
        raise ValueError(
            f"{name} as a Tensor is not supported for capturable=False and foreach=True; "
            "pass capturable=True, or leave foreach out"
        )


def check_implementation(group: dict[str, Any]) -> None:
    if group.get("fused") and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`; pass one of them")
    if group.get("fused") and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.; pass one of them")


def warn_of_misspelling(group: dict[str, Any], known: dict[str, Any]) -> None:
    """Other keys are the user's own business (name, initial_lr, lr_scale), but weigth_decay is not meant."""
    for key in group:
        if key in known or key in ("params", "param_names"):
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if close:
            warnings.warn(
                f"parameter group has an unknown option {key!r}, which changes nothing; did you mean {close[0]!r}?",
                UserWarning,
                stacklevel=level_of_caller(),
            )


def level_of_caller() -> int:
    """The stacklevel of the first frame outside of torch and torchcalc, for a warning of the calling function."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "torchcalc"):
        level, frame = level + 1, frame.f_back
    return level
