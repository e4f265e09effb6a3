"""What of the caller's a subject can reach, and everything in it as it was before the checks.

Put back are the parameters, buffers, hooks and flags of modules, tensors, lists, dicts, sets, the fields of objects and
classes, and the names of a function's closure and globals.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.reach import own, walk

__all__ = ["untouched"]

Undo = Callable[[], None]


@contextlib.contextmanager
def untouched(*things: Any) -> Iterator[None]:
    """Whatever of these, and of what they reach, is changed inside, is put back at the end."""
    reached = [x for _, x in walk(*things)]  # all is found before anything is called
    undo = [undo for x in reached for undo in undoing(x)]
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def undoing(x: Any) -> Iterator[Undo]:
    """What puts an object back as it is now, without what it holds."""
    if isinstance(x, Tensor):
        yield _tensor(x)
    elif isinstance(x, nn.Module):
        yield _module(x)
    elif isinstance(x, types.FunctionType):
        yield from _function(x)
    elif isinstance(x, list | dict | set):
        yield _container(x)
    elif own(x if isinstance(x, type) else type(x)) and hasattr(x, "__dict__"):
        yield _fields(x)


def _module(module: nn.Module) -> Undo:
    own = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}

    def undo() -> None:
        for name in [name for name in vars(module) if name not in own]:
            del vars(module)[name]
        for name, value in own.items():
            there = vars(module).get(name)
            if isinstance(value, dict) and isinstance(there, dict):
                if (
                    there != value
                    if name.endswith("hooks")
                    else list(map(id, there.values())) != list(map(id, value.values()))
                ):
                    there.clear()
                    there.update(value)
            elif there is not value:
                vars(module)[name] = value

    return undo


def _function(fn: types.FunctionType) -> Iterator[Undo]:
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield functools.partial(setattr, cell, "cell_contents", cell.cell_contents)
    for name in fn.__code__.co_names:
        if name in fn.__globals__:
            yield functools.partial(fn.__globals__.__setitem__, name, fn.__globals__[name])


def _fields(x: Any) -> Undo:
    old = {k: v for k, v in vars(x).items() if not k.startswith("__") and not callable(v)}
    settable = not any(isinstance(v, property | staticmethod | classmethod) for v in old.values())

    def undo() -> None:
        for name, value in old.items() if settable else ():
            if vars(x).get(name) is not value:
                with contextlib.suppress(AttributeError):  # frozen
                    setattr(x, name, value)

    return undo


def _tensor(x: Tensor) -> Undo:
    """Puts back values, gradient, requires_grad and hooks."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_meta
    values = x.detach().clone() if plain else None
    grad = x.grad if x.is_leaf else None
    grad_values = None if grad is None else grad.detach().clone()
    needs = x.requires_grad
    hooks = dict(x._backward_hooks) if x._backward_hooks else None

    def undo() -> None:
        with torch.no_grad():
            if values is not None and (x.shape != values.shape or x.dtype != values.dtype):
                x.data = values
            elif values is not None and not _same(x, values):
                x.data.copy_(values)
            if grad is not None and grad_values is not None and not _same(grad, grad_values):
                grad.copy_(grad_values)
        if x.is_leaf and x.grad is not grad:
            x.grad = grad
        if x.is_leaf and x.requires_grad != needs:
            x.requires_grad_(needs)
        if x._backward_hooks and dict(x._backward_hooks) != (hooks or {}):
            x._backward_hooks.clear()
            x._backward_hooks.update(hooks or {})

    return undo


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x, y) or (x.is_floating_point() and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True))


def _items(x: Any) -> list[Any]:
    """The entries by identity."""
    return [*map(id, x), *map(id, x.values())] if isinstance(x, dict) else [*map(id, x)]


def _container(x: Any) -> Undo:
    old = x.copy()

    def undo() -> None:
        if _items(x) != _items(old):
            x.clear()
            x.extend(old) if isinstance(x, list) else x.update(old)

    return undo
