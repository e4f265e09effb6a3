"""What of the caller's a subject can reach, and everything in it as it was before the checks.

Found are the parameters, buffers, hooks and flags of modules, and the tensors, lists, dicts, sets and objects in a
function's closure, defaults and globals, in a partial, behind a bound method, and on an autograd.Function's class.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["untouched"]

Undo = Callable[[], None]
MOST = 10_000  # objects that are looked at: a subject may hold a data set


@contextlib.contextmanager
def untouched(*things: Any) -> Iterator[None]:
    """Whatever of these, and of what they reach, is changed inside, is put back at the end."""
    found = _Walk()
    for thing in things:
        found.visit(thing)
    try:
        yield
    finally:
        for undo in found.undo:
            undo()


class _Walk:
    """A walk over what can be reached; ``undo`` is what puts it back."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}
        self.undo: list[Undo] = []

    def visit(self, x: Any) -> None:
        if id(x) in self.seen or len(self.seen) >= MOST or isinstance(x, str | bytes | int | float | types.ModuleType):
            return
        self.seen[id(x)] = x
        if isinstance(x, Tensor):
            self.undo.append(_tensor(x))
        elif isinstance(x, nn.Module):
            self.module(x)
        elif isinstance(x, functools.partial):
            self.each(x.func, *x.args, *x.keywords.values())
        elif isinstance(x, types.MethodType):
            self.each(x.__self__, x.__func__)
        elif isinstance(x, types.FunctionType):
            self.function(x)
        elif isinstance(x, list | dict | set):
            self.undo.append(_container(x))
            self.each(*(x.values() if isinstance(x, dict) else x))
        elif isinstance(x, tuple):
            self.each(*x)
        elif isinstance(x, type):
            if issubclass(x, torch.autograd.Function) and not x.__module__.startswith("torch."):
                self.fields(x)
        elif not type(x).__module__.startswith(("torch.", "builtins", "numpy")) and hasattr(x, "__dict__"):
            self.fields(x)

    def each(self, *xs: Any) -> None:
        for x in xs:
            self.visit(x)

    def module(self, module: nn.Module) -> None:
        for part in module.modules():
            self.seen[id(part)] = part
            own = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(part).items()}

            def undo(part: nn.Module = part, own: dict[str, Any] = own) -> None:
                for name in [name for name in vars(part) if name not in own]:
                    del vars(part)[name]
                for name, value in own.items():
                    there = vars(part).get(name)
                    if isinstance(value, dict) and isinstance(there, dict):
                        if (
                            there != value
                            if name.endswith("hooks")
                            else list(map(id, there.values())) != list(map(id, value.values()))
                        ):
                            there.clear()
                            there.update(value)
                    elif there is not value:
                        vars(part)[name] = value

            self.undo.append(undo)
            self.each(*part._parameters.values(), *part._buffers.values())
            self.each(*(v for k, v in vars(part).items() if not k.startswith("_")))

    def function(self, fn: types.FunctionType) -> None:
        if f"{torch.__path__[0]}/" in fn.__code__.co_filename:
            return  # torch.compile's wrapper and its like: what they hold is torch's
        for cell in fn.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                value = cell.cell_contents
                self.undo.append(functools.partial(setattr, cell, "cell_contents", value))
                self.visit(value)
        self.each(*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values())
        for name in fn.__code__.co_names:
            if name in fn.__globals__:
                value = fn.__globals__[name]
                self.undo.append(functools.partial(fn.__globals__.__setitem__, name, value))
                self.visit(value)

    def fields(self, x: Any) -> None:
        own = {k: v for k, v in vars(x).items() if not k.startswith("__") and not callable(v)}

        def undo() -> None:
            for name, value in own.items():
                if vars(x).get(name) is not value:
                    with contextlib.suppress(AttributeError):  # frozen
                        setattr(x, name, value)

        if not any(isinstance(v, property | staticmethod | classmethod) for v in own.values()):
            self.undo.append(undo)
        self.each(*vars(x).values())


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
