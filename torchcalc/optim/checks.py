"""Checks of hyperparameters, before anything is changed: torch's exception and words first, then the remedy."""

from __future__ import annotations

import difflib
import math
import warnings
from typing import Any

from torch import Tensor

__all__ = [
    "check_at_least_zero",
    "check_betas",
    "check_implementation",
    "check_one_element",
    "check_tensor_hyperparameters",
    "warn_of_misspelling",
]


def check_one_element(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"Tensor {name} must be 1-element, but its shape is {tuple(value.shape)}; pass torch.tensor(0.1)"
        )


def check_at_least_zero(what: str, value: Any) -> None:
    """What is 'learning rate', 'epsilon value', ... Unlike torch's, this refuses nan and inf."""
    number = float(value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"Invalid {what}: {value}; it must be a finite number >= 0")


def check_betas(betas: Any) -> None:
    for i in (0, 1):
        if not 0.0 <= float(betas[i]) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}; it must be in [0, 1)")


def check_tensor_hyperparameters(group: dict[str, Any]) -> None:
    """What Adam says about lr and betas as tensors."""
    alone = group["foreach"] and not group["capturable"]
    remedy = "; pass capturable=True, or leave foreach out"
    if isinstance(group["lr"], Tensor) and alone:
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True" + remedy)
    betas = group["betas"]
    are_tensors = [isinstance(b, Tensor) for b in betas]
    if not (all(are_tensors) or all(isinstance(b, float) for b in betas)):
        raise ValueError(f"betas must be either both floats or both Tensors, but are {betas}; write e.g. 0.0 for 0")
    if all(are_tensors):
        for i, b in enumerate(betas):
            if alone:
                raise ValueError(
                    f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True" + remedy
                )
            check_one_element(f"betas[{i}]", b)


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
                stacklevel=4,
            )
