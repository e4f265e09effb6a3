"""Which backend computes a formula: the C++ loops on CPU, Triton kernels on a GPU, or the formula itself on tensors.

A kernel is taken for plain tensors where nothing looks on: no subclass, no ``torch.func``, no forward-mode AD, no tracing,
no mode that wants to see each operation. It says itself whether it takes the dtypes. Everything else is the reference.

On CPU forward and backward are one operator with a node of its own in the graph (``native/csrc/node``). A backward that is
differentiated again comes back to Python, to :func:`torchcalc.formula.pointwise.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _is_any_autocast_enabled
from torch._C import _len_torch_dispatch_stack as _modes
from torch.autograd import forward_ad

from torchcalc.native import pointwise as kernels

if TYPE_CHECKING:
    from torchcalc.formula.pointwise import Formula

__all__ = ["elementwise", "reduced", "total", "value"]

PLAIN = (Tensor, torch.nn.Parameter)
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def unobserved() -> bool:
    """Whether an operation of ours may stand for the operations of the formula."""
    return not (
        _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _modes()
        or _get_tracing_state() is not None
    )


def elementwise(formula: Formula, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference with the ways around it."""
    n = len(formula.inputs)
    is_compiling = torch.compiler.is_compiling

    def one(x: Tensor, *numbers: float) -> Tensor:
        if not is_compiling() and type(x) in PLAIN and unobserved():
            if x.is_cpu and (index := kernels.index(formula)) >= 0:
                y = kernels.elementwise_of_one(index, x, numbers)
                if y is not None:
                    return y
        return reference(x, *numbers)

    def several(*args: Any) -> Tensor:
        if not is_compiling() and unobserved():
            inputs = args[:n]
            if all(type(x) in PLAIN and x.is_cpu for x in inputs) and (index := kernels.index(formula)) >= 0:
                y = kernels.elementwise(index, inputs, args[n:])
                if y is not None:
                    return y
        return reference(*args)

    return one if n == 1 else several


def reduced(formula: Formula, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Likewise of a loss: (*inputs, weight, reduction, by_weight, *parameters)."""
    n = len(formula.inputs)

    def call(*args: Any) -> Tensor:
        if not torch.compiler.is_compiling() and unobserved() and args[n + 1] in REDUCTIONS:
            *inputs, weight, reduction, by_weight = args[: n + 3]
            numbers = args[n + 3 :]
            if _is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"):
                inputs = [_as_float32(x) for x in inputs]
                weight = None if weight is None else _as_float32(weight)
            given = inputs if weight is None else [*inputs, weight]
            if all(type(x) in PLAIN and x.is_cpu for x in given) and (index := kernels.index(formula)) >= 0:
                y = kernels.reduced(index, inputs, weight, numbers, REDUCTIONS[reduction], by_weight)
                if y is not None:
                    return y
        return reference(*args)

    return call


def _as_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def value(formula: Formula, inputs: Sequence[Tensor], numbers: Sequence[float]) -> Tensor | None:
    """The value by a kernel, without a graph; None if none takes it."""
    return None


def total(
    formula: Formula,
    inputs: Sequence[Tensor],
    weight: Tensor | None,
    reduction: str,
    by_weight: bool,
    numbers: Sequence[float],
) -> Tensor | None:
    """The reduced value by a kernel, without a graph; None if none takes it."""
    return None
