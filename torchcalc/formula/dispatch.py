"""Which backend computes a formula: the C++ loops on CPU, Triton kernels on a GPU, or the formula itself on tensors.

A kernel is taken for plain tensors where nothing looks on: no subclass, no ``torch.func``, no forward-mode AD, no tracing,
no mode that wants to see each operation. It says itself whether it takes the dtypes. Everything else is the reference.

On CPU forward and backward are one operator with a node of its own in the graph (``native/csrc/node``). A backward that is
differentiated again comes back to Python, to :func:`torchcalc.formula.pointwise.gradients`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from torchcalc import native
from torchcalc.formula import launched
from torchcalc.native import gpu
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import widen
from torchcalc.tracing import tracer_of

if TYPE_CHECKING:
    from torchcalc.formula.pointwise import Formula

__all__ = ["elementwise", "is_built", "of_halves", "reduced"]


def elementwise(formula: Formula, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference, with the ways around it."""
    n = len(formula.inputs)
    built = is_built(formula)
    place: int | None = None
    compute: Any = None
    launch: Any = None
    is_compiling = torch.compiler.is_compiling

    def apply(*args: Any) -> Tensor:
        nonlocal place, compute, launch
        if is_compiling():
            return reference(*args)
        if place is None:
            place = kernels.index(formula)
            compute = kernels.elementwise if place >= 0 else None
        y = compute(place, *args) if compute is not None else None
        if y is None and isinstance(args[0], Tensor) and (args[0].is_cuda or gpu.INTERPRETED):
            launch = launch or launched.elementwise(formula)
            y = launch(*args)
        if y is not None:
            return y
        if compute is None and built:
            native.warn_once(args[:n], nodes=True)
        if (tracer := tracer_of(args)) is not None:
            apply.__module__ = formula.value.__module__
            apply.__name__ = apply.__qualname__ = name_of(apply, apply.__module__)
            node: Any = tracer.create_proxy("call_function", apply, args, {})  # not the reference, which is slower
            return node
        return reference(*args)

    apply.formula = formula  # type: ignore[attr-defined]
    return apply


def of_halves(formula: Formula, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The formula of the halves of one tensor along a dimension: (input, dim, *parameters), which is the function elsewhere."""

    def apply(input: Tensor, dim: int, *numbers: float) -> Tensor:
        if not torch.compiler.is_compiling() and (place := kernels.index(formula)) >= 0:
            y: Tensor | None = kernels.of_halves(place, input, dim, *numbers)
            if y is not None:
                return y
        return function(input, dim, *numbers)

    return apply


def reduced(formula: Formula, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Likewise of a loss: (*inputs, weight, reduction, by_weight, *parameters)."""
    n = len(formula.inputs)
    built = is_built(formula)
    launch: Any = None
    is_compiling = torch.compiler.is_compiling

    def apply(*args: Any) -> Tensor:
        nonlocal launch
        if is_compiling() or (how := kernels.REDUCTIONS.get(args[n + 1])) is None or not isinstance(args[0], Tensor):
            return reference(*args)
        inputs = args[: n + 1]
        if _is_any_autocast_enabled() and torch.is_autocast_enabled(args[0].device.type):
            inputs = tuple(map(widen, inputs))
        y = None
        if (place := kernels.index(formula)) >= 0:
            y = kernels.reduced(place, *inputs, how, *args[n + 2 :])
        if y is None and how != 0 and (args[0].is_cuda or gpu.INTERPRETED):
            launch = launch or launched.reduced(formula)
            y = by_launch(launch, how == 1, args[n + 2], *inputs, numbers=args[n + 3 :])
        if y is not None:
            return y
        if place < 0 and built:
            native.warn_once(args[:n], nodes=True)
        return reference(*args)

    return apply


def name_of(value: Any, module: str) -> str:
    """Its name in its module, under which what torch.fx has traced can be pickled."""
    names = (name for name, found in vars(sys.modules[module]).items() if found is value)
    return next(names, value.__name__)


def is_built(formula: Formula) -> bool:
    """Whether `python -m torchcalc build` makes CPU kernels of it: it makes those of our own formulas."""
    return formula.value.__module__.startswith("torchcalc.")


def by_launch(
    launch: Callable[..., Tensor | None], mean: bool, by_weight: bool, *inputs: Any, numbers: tuple[float, ...]
) -> Tensor | None:
    """The reduced loss of (*inputs, weight) by a launch; None where it does not take them."""
    *tensors, weight = inputs
    n = tensors[0].numel()
    if not mean:
        return launch(1.0, weight, *tensors, *numbers)
    if n == 0:
        return None
    if weight is None or not by_weight:
        return launch(1.0 / n, weight, *tensors, *numbers)
    if tensors[0].dtype in (torch.bfloat16, torch.float16):  # the sum may be beyond their range
        return None
    total = launch(1.0, weight, *tensors, *numbers)
    return None if total is None else total / weight.sum()
