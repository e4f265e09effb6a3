"""The operations in the graph of an output, and those among them that stand in the way of a derivative."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from torchcalc.native import pointwise

__all__ = ["checkpointed", "foreign", "leaves", "nodes", "once", "saved"]

ONCE = once_differentiable(lambda ctx: None).__code__  # that of all backwards which it has wrapped


def nodes(output: Tensor) -> Iterator[Any]:
    """The nodes of a graph, each once, in no order; inside a functorch transform, of its innermost level."""
    waiting: list[Any] = [output.grad_fn]
    seen = {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting.extend(n for n, _ in node.next_functions)


def leaves(output: Tensor) -> Iterator[Tensor]:
    """The variables that an output depends on."""
    if output.grad_fn is None and output.requires_grad:
        yield output
    for node in nodes(output):
        if hasattr(node, "variable"):
            yield node.variable


def foreign(output: Tensor) -> bool:
    """Whether there are operations whose second derivative neither torch nor torchcalc answers for."""
    return any(
        not _written(type(node)._forward_cls).__module__.startswith("torchcalc.")  # type: ignore[attr-defined]
        if isinstance(node, BackwardCFunction)  # written in Python
        else type(node).__name__ == "CppFunction"
        and pointwise.saved(node) is None  # in C++, outside torch and torchcalc
        for node in nodes(output)
    )


def once(output: Tensor) -> str:
    """The reason why there is no second derivative, if a Function is marked with ``once_differentiable``; else empty."""
    for node in nodes(output):
        if isinstance(node, BackwardCFunction):
            cls = _written(type(node)._forward_cls)  # type: ignore[attr-defined]
            if any(getattr(method, "__code__", None) is ONCE for method in (cls.backward, cls.vjp)):
                return (
                    f"second derivatives are silently missing: the backward of {cls.__name__} is marked with "
                    "once_differentiable"
                )
    return ""


def _written(cls: Any) -> Any:
    """The Function itself, of which functorch makes classes of its own."""
    while "autograd_function" in (names := getattr(getattr(cls.backward, "__code__", None), "co_freevars", ())):
        cls = cls.backward.__closure__[names.index("autograd_function")].cell_contents
    return cls


def checkpointed(output: Tensor) -> bool:
    """Whether a part of the graph is computed again in backward (``torch.utils.checkpoint``, of either kind)."""
    for node in nodes(output):
        if type(node).__name__ == "CheckpointFunctionBackward":
            return True
        for tensor in saved(node):
            if getattr(tensor.unpack_hook, "__module__", "") == "torch.utils.checkpoint":
                return True
    return False


def saved(node: Any) -> Iterator[Any]:
    """What a node keeps for backward, as torch's SavedTensor."""
    yield from pointwise.saved(node) or ()
    for name in _slots(node.__class__):
        value = getattr(node, name)
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if tensor is not None:
                yield tensor


@cache
def _slots(cls: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(cls) if name.startswith("_raw_saved_"))
