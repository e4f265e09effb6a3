"""Formulas on a GPU in torch's graph: a forward and a backward of one launch each, by a Function as bare as can be.

What launches do not take, and what is differentiated again, goes by the formula on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad

from torchcalc.formula.launch import (
    PROGRAMS,
    Launcher,
    find,
    fits,
    launch_loss,
    launch_loss_product,
    launch_product,
    launch_value,
    launch_whole,
    total,
)
from torchcalc.native import gpu
from torchcalc.native import pointwise as kernels

if TYPE_CHECKING:
    from torchcalc.formula.pointwise import Formula

__all__ = ["elementwise", "enter", "reduced", "whole_kernels"]

#: Sets of parameters for which the nodes know kernels: a formula whose numbers change at every call goes through Python.
MOST_ENTERED = 256


def is_observed() -> bool:
    """Whether something wants to see the operations of the formula."""
    return (
        _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or _get_tracing_state() is not None
    )


def elementwise(formula: Formula) -> Callable[..., Tensor | None]:
    """The function of (*inputs, *parameters); None where no launch takes them."""
    n = len(formula.inputs)

    class Launched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            y = launch_value(formula, args[:n], args[n:])
            ctx.numbers = args[n:]
            known = dict(zip((*formula.inputs, "y"), (*args[:n], y), strict=True))
            ctx.save_for_backward(*(known[name] for name in formula.saved))
            return y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            known = dict(zip(formula.saved, ctx.saved_tensors, strict=True))
            needed = ctx.needs_input_grad[:n]
            if torch.is_grad_enabled() or not fits([*known.values(), g]):
                grads = differentiable(formula, g, known, ctx.numbers, needed)
            else:
                saved = [known.get(name) for name in (*formula.inputs, "y")]
                grads = [
                    launch_product(formula, i, g, _used(formula, i, saved), ctx.numbers) if needed[i] else None
                    for i in range(n)
                ]
            return *grads, *(None for _ in ctx.numbers)

    Launched.__name__ = Launched.__qualname__ = formula.name

    def apply(*args: Any) -> Tensor | None:
        inputs = args[:n]
        if not fits(inputs) or is_observed() or any(x.dtype != inputs[0].dtype for x in inputs[1:]):
            return None
        enter(formula, inputs[0], args[n:], _elementwise_kernels)
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return Launched.apply(*args)
        return launch_value(formula, inputs, args[n:])

    return apply


def reduced(formula: Formula) -> Callable[..., Tensor | None]:
    """The sum of (scale, weight or None, *inputs, *parameters); None where no launch takes them."""
    n = len(formula.inputs)
    by_weight = formula.weighted

    class Launched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, scale: float, weight: Tensor | None, *args: Any) -> Tensor:
            ctx.scale, ctx.numbers = scale, args[n:]
            ctx.save_for_backward(*args[:n], weight)
            if weight is None:
                return launch_loss(formula, args[:n], args[n:], scale=scale)
            return launch_loss(by_weight, [*args[:n], weight], args[n:], scale=scale)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            (*inputs, weight), needed = ctx.saved_tensors, ctx.needs_input_grad[2 : 2 + n]
            if torch.is_grad_enabled() or not fits([g]):
                each = g * ctx.scale if weight is None else g * ctx.scale * weight
                known = dict(zip(formula.inputs, inputs, strict=True))
                grads = differentiable(formula, each, known, ctx.numbers, needed)
            else:
                f, saved = (formula, inputs) if weight is None else (by_weight, (*inputs, weight))
                grads = [
                    launch_loss_product(
                        f, i, g, _used(f, i, saved), ctx.numbers, scale=ctx.scale, dtype=inputs[i].dtype
                    )
                    if needed[i]
                    else None
                    for i in range(n)
                ]
            return None, None, *grads, *(None for _ in ctx.numbers)

    Launched.__name__ = Launched.__qualname__ = formula.name

    def apply(scale: float, weight: Tensor | None, *args: Any) -> Tensor | None:
        inputs = args[:n]
        given = inputs if weight is None else (*inputs, weight)
        if not fits(given) or is_observed() or any(x.dtype != inputs[0].dtype for x in given[1:]):
            return None
        if torch.is_grad_enabled() and weight is not None and weight.requires_grad:
            return None
        if weight is None:
            enter(formula, inputs[0], args[n:], _loss_kernels)
        return Launched.apply(scale, weight, *args)

    return apply


def _used(formula: Formula, i: int, saved: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The inputs and the output, less those that the product does not read."""
    product = formula.products[i]
    assert product is not None
    names = product.inputs()
    return [x if name in names else None for name, x in zip((*formula.inputs, "y"), saved, strict=False)]


def differentiable(
    formula: Formula, g: Tensor, known: dict[str, Any], numbers: Sequence[float], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients by operations that torch can differentiate."""
    from torchcalc.formula.pointwise import gradients

    x = next(iter(known.values()))  # all inputs are of this shape and dtype
    known = known | dict(zip(formula.parameters, numbers, strict=True))
    return gradients(formula, g, known, needed, [(x.shape, x.dtype)] * len(needed))


_entered: set[Any] = set()


def enter(formula: Formula, x: Tensor, numbers: Sequence[float], kernels_of: Callable[..., Iterator[Any]]) -> None:
    """Compile the formula's kernels for x's dtype and device, and tell the nodes, which launch them from then on."""
    key = formula.name, x.dtype, x.device, kernels_of, tuple(numbers)
    place = kernels.index(formula)
    if key in _entered or place < 0 or len(_entered) >= MOST_ENTERED or gpu.capturing(x.device):
        return
    _entered.add(key)
    with torch.no_grad():
        found = list(kernels_of(formula, x, numbers))
    for where, kind, launcher, parameters in found:
        handle = launcher.kernel.handle(x.device)
        if handle is None:
            return
        given = tuple(map(float, parameters))
        kernels.enter_launch(
            place if where is None else where, kind, x.dtype, x.device.index, *handle, launcher.block, given,
            launcher.numbers(*parameters),
        )  # fmt: skip


# The kinds of csrc/node/gpu.h. Each kernel is launched once here, over nothing that matters: that compiles it.
VALUE, LOSS, PARTIAL, WHOLE, PRODUCT, LOSS_PRODUCT = 0, 1, 2, 3, 8, 16
TOTAL = 0xFFFF  # the place of the sum of partial sums, which is nobody's formula


def _elementwise_kernels(formula: Formula, x: Tensor, numbers: Sequence[float]) -> Iterator[Any]:
    one = torch.zeros(16, dtype=x.dtype, device=x.device)
    inputs = [one] * len(formula.inputs)
    launch_value(formula, inputs, numbers)
    yield None, VALUE, find(formula, "value", [*inputs, one]), numbers
    for i, product in enumerate(formula.products):
        if product is not None:
            saved = _used(formula, i, [*inputs, one])
            launch_product(formula, i, one, saved, numbers)
            yield None, PRODUCT + i, find(formula, i, [one, *saved, one]), numbers


def whole_kernels(formula: Formula, x: Tensor, numbers: Sequence[float]) -> Iterator[Any]:
    """Of what keeps the inputs alone: all gradients with the value; and the rest, since where nodes know one they know all."""
    yield from _elementwise_kernels(formula, x, numbers)
    one = torch.zeros(16, dtype=x.dtype, device=x.device)
    inputs = [one] * len(formula.inputs)
    results = launch_whole(formula, one, inputs)
    yield None, WHOLE, find(formula, "whole", [one, *inputs, *results]), ()


def _loss_kernels(formula: Formula, x: Tensor, numbers: Sequence[float]) -> Iterator[Any]:
    g = torch.zeros((), dtype=x.dtype, device=x.device)
    for kind, name, size in ((LOSS, "loss", 16), (PARTIAL, "partial", 1 << 14)):
        inputs = [torch.zeros(size, dtype=x.dtype, device=x.device)] * len(formula.inputs)
        launch_loss(formula, inputs, numbers)
        out = g if kind == LOSS else torch.zeros((), dtype=torch.float64, device=x.device)
        yield None, kind, find(formula, name, [*inputs, out]), numbers
    for i, product in enumerate(formula.products):
        if product is not None:
            saved = _used(formula, i, inputs)
            launch_loss_product(formula, i, g, saved, numbers, dtype=x.dtype)
            yield None, LOSS_PRODUCT + i, find(formula, (i,), [g, *saved, inputs[0]]), numbers
    yield TOTAL, VALUE, Launcher(total(x.dtype), lambda: (), PROGRAMS), ()
