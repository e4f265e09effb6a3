"""What the graph of the outputs says: which custom Functions are in it, what is declared of them, and what is torch's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

__all__ = ["backward_of", "custom", "declared_once", "nodes", "of_torch", "opaque", "own_rule"]


def nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """The custom Functions' nodes of the graph, from the outputs on."""
    todo: list[Any] = [y.grad_fn for y in outputs]
    seen: set[Any] = set()
    while todo:
        node = todo.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            yield node
        todo += [n for n, _ in node.next_functions]


def functions_of(outputs: Sequence[Tensor]) -> Iterator[type[Any]]:
    """Their classes."""
    return (type(node)._forward_cls for node in nodes(outputs))


def custom(outputs: Sequence[Tensor]) -> bool:
    """Whether a custom Function is in the graph; without one, the derivatives are torch's own."""
    return any(True for _ in nodes(outputs))


def backward_of(outputs: Sequence[Tensor]) -> str:
    """Where the first backward in Python stands that the graph of the outputs comes to: "X.backward, file.py:12"."""
    for function in functions_of(outputs):
        method = vars(function).get("backward") or vars(function).get("vjp") or function.backward
        with suppress(TypeError, OSError, AttributeError):
            code = inspect.unwrap(getattr(method, "__func__", method)).__code__
            if f"{torch.__path__[0]}/" not in code.co_filename:
                return f"{function.__name__}.backward, {code.co_filename}:{code.co_firstlineno}"
    return ""


def declared_once(outputs: Sequence[Tensor]) -> bool:
    """Whether a backward is declared once_differentiable."""
    wrapper = once_differentiable(custom).__code__
    return any(getattr(function.backward, "__code__", None) is wrapper for function in functions_of(outputs))


def own_rule(outputs: Sequence[Tensor], name: str) -> bool:
    """Whether a custom Function of the graph has a rule of its own of that name: vmap, jvp."""
    plain = getattr(torch.autograd.Function, name)
    return any(getattr(function, name) is not plain for function in functions_of(outputs))


def of_torch(fn: Any) -> bool:
    """Whether a callable is torch's own throughout, whose mistakes are not the caller's."""
    while hasattr(fn, "func"):
        fn = fn.func
    if opaque(fn):
        return str(getattr(fn, "namespace", "")) in ("aten", "prims") and not hasattr(fn, "_torchdynamo_orig_callable")
    if isinstance(fn, torch.nn.Module):
        hooks = [h for m in fn.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        return all(map(made_by_torch, [*map(type, fn.modules()), *hooks]))
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, type):  # Function.apply
        fn = owner
    elif inspect.isbuiltin(fn):
        return True
    return made_by_torch(fn)


def made_by_torch(x: Any) -> bool:
    return (getattr(x, "__module__", None) or "").partition(".")[0] == "torch"


def opaque(fn: Any) -> str:
    """What the function is, if torch drops forward mode in it without a word; empty if not."""
    if hasattr(fn, "_torchdynamo_orig_callable"):
        return "a compiled function"
    kinds = (torch._library.custom_ops.CustomOpDef, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    return "an operator of torch.library" if isinstance(fn, kinds) else ""
