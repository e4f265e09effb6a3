"""What the constructors of all optimizers have in common, said once: how arguments become defaults, and their help."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["WHOLE", "documented", "takes_defaults"]

#: Options of the whole optimizer, which groups cannot have.
WHOLE = ("max_norm", "skip_nonfinite", "rounding")

COMMON = """
        params: parameters, named parameters, or dicts of parameter groups.
        lr: step size, a finite number >= 0 or a 1-element tensor.
        foreach: True: as lists of tensors; False: tensor by tensor, equal to the last bit to torch's loop where torch has
            one; None: whichever is fastest.
        maximize: ascend.
        capturable: keep the step count on the device, for CUDA graphs.
        differentiable: let autograd record the step; the parameters are then not leaves.
        fused: True: the native kernel where there is one (the default on CPU), and unscaling inside
            ``GradScaler.step``; for floating-point parameters only.
        max_norm: clip the gradient to this norm over all groups inside the step, as ``clip_grad_norm_`` beforehand
            does, but ``p.grad`` is left alone; the norm found is in ``optimizer.grad_norm``. inf only measures it.
        skip_nonfinite: leave out a step with inf or nan in any gradient; ``optimizer.skipped_steps`` counts them.
        rounding: how bfloat16 and float16 parameters are rounded, "nearest" or "stochastic" (see ``extras.py``). Copies of
            weights, as DDP has them, stay equal if torch's generator is in the same state on every rank.
"""
RAISES = """
    Raises:
        ValueError: an argument, also of a single group, out of range; found before anything is changed.
"""

P = ParamSpec("P")
Class = TypeVar("Class", bound=type)


def takes_defaults(**fixed: Any) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Of a constructor that is all signature: its arguments, and the fixed ones, are the defaults of the groups.

    But for params, and the options of the whole optimizer. What stands in its body comes afterwards.
    """

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def __init__(*args: P.args, **kwargs: P.kwargs) -> None:
            from torchcalc.optim.optimizer import Optimizer

            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            options = {key: bound.arguments.pop(key) for key in WHOLE}
            self, params = bound.arguments.pop("self"), bound.arguments.pop("params")
            Optimizer.__init__(self, params, {**bound.arguments, **fixed}, **options)
            init(*args, **kwargs)

        return __init__

    return decorate


def documented(cls: Class) -> Class:
    """The class with help for every argument: its own docstring's, its parent's, or what is common to all."""
    if cls.__doc__ is None:  # python -OO
        return cls
    told = _entries(COMMON)
    for parent in reversed(cls.__mro__[1:]):
        if issubclass(parent, torch.optim.Optimizer) and parent.__module__.startswith("torchcalc."):
            told.update(_entries(parent.__doc__ or ""))
    before, _, rest = cls.__doc__.partition("    Args:\n")
    own, _, after = rest.partition("\n\n")
    told.update(_entries(own + "\n"))
    arguments = "".join(told[name] for name in inspect.signature(cls).parameters)
    raises = "" if "    Raises:\n" in after else RAISES
    cls.__doc__ = f"{before}    Args:\n{arguments}{raises}\n{after}"
    return cls


def _entries(text: str) -> dict[str, str]:
    """Argument to its lines, of the section Args of a docstring."""
    entries = re.finditer(r"^ {8}(\w+): .*\n(?: {12}.*\n)*", text, re.MULTILINE)
    return {entry[1]: entry[0] for entry in entries}
