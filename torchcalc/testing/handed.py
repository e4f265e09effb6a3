"""What is handed in: how it is called, and what of it is refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import SequenceKey, keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

__all__ = [
    "is_float",
    "module_call",
    "name_of",
    "opened",
    "parameters_of",
    "refuse",
]


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def name_of(fn: Any) -> str:
    """
    >>> name_of(partial(torch.nn.functional.gelu, approximate="tanh"))
    "gelu(approximate='tanh')"
    """
    if isinstance(fn, partial):
        options = [repr(a) for a in fn.args] + [f"{k}={v!r}" for k, v in fn.keywords.items()]
        return f"{name_of(fn.func)}({', '.join(options)})"
    if isinstance(fn, nn.Module):
        return repr(fn).partition("\n")[0]
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"{owner.__name__}.apply"
    return getattr(fn, "__name__", None) or type(fn).__name__


def parameters_of(fn: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        return {}


def refuse(i: int, x: Tensor) -> None:
    """Raise ValueError for an input on which no derivative can be checked."""
    if x.is_meta:
        raise ValueError(f"input {i} is on the device meta and has no values; make it with device='cpu'")
    if x.layout != torch.strided:
        raise ValueError(
            f"input {i} is sparse ({str(x.layout).removeprefix('torch.')}), and derivatives are checked element by "
            "element of dense inputs; give a function of its values, such as "
            "lambda values: fn(torch.sparse_coo_tensor(indices, values, size))"
        )
    if isinstance(x, torch.distributed.tensor.DTensor) if "torch.distributed.tensor" in sys.modules else False:
        raise ValueError(
            f"input {i} is a DTensor, of which each process holds a part; check a function of the local tensors, such "
            "as lambda local: fn(DTensor.from_local(local, mesh, placements)).to_local()"
        )


def module_call(module: nn.Module, count: int) -> Callable[..., Any]:
    """The module as a function of its inputs and parameters; its buffers are copied at each call."""
    names = [n for n, _ in module.named_parameters()]

    def call(*inputs: Any) -> Any:
        dtype = next((x.dtype for x in tree_leaves(inputs) if is_float(x)), torch.float32)
        buffers = {
            n: b.to(dtype, copy=True) if is_float(b) and is_float(tree_leaves(inputs)[0]) else b.clone()
            for n, b in module.named_buffers()
        }
        state = {**buffers, **dict(zip(names, inputs[count:], strict=True))}
        return torch.func.functional_call(module, state, inputs[:count])

    call.__name__ = name_of(module)
    return call


def opened(
    inputs: Sequence[Any], names: Sequence[str]
) -> tuple[list[Any], list[str], Callable[[Sequence[Any]], Sequence[Any]] | None]:
    """(inputs, their names, what makes the arguments of them): lists and dicts that hold float tensors as their leaves."""
    if all(isinstance(x, Tensor) or not any(map(is_float, tree_leaves(x))) for x in inputs):
        return list(inputs), list(names), None
    found, spec = tree_flatten_with_path(tuple(inputs))
    labels = [f"{names[cast(SequenceKey[Any], path[0]).idx]}{keystr(path[1:])}" for path, _ in found]
    return [x for _, x in found], labels, lambda leaves: tree_unflatten(list(leaves), spec)
