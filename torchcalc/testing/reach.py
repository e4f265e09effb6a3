"""What a callable reaches: its closure, defaults and globals, its module and the parts of that, its objects and classes."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CONTAINERS", "walk"]

CONTAINERS = (list, dict, set, bytearray)
PLAIN = (str, bytes, int, float, complex, torch.dtype, torch.device, types.ModuleType)
LIBRARIES = ("torch", "numpy", "builtins", "typing", "types", "functools", "itertools", "collections", "math", "abc")
MOST = 10_000  # objects that are looked at: a subject may hold a data set


def walk(*things: Any) -> Iterator[tuple[str, Any]]:
    """(name, object) of all that can be reached and changed, each object once, in the order of depth."""
    todo: list[tuple[str, Any]] = [("", x) for x in reversed(things)]
    seen: dict[int, Any] = {}
    while todo and len(seen) < MOST:
        name, x = todo.pop()
        if x is None or id(x) in seen or isinstance(x, PLAIN):
            continue
        seen[id(x)] = x
        yield name, x
        todo += reversed(list(parts(name, x)))


def parts(name: str, x: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds by name, as far as the user's code may keep something there."""
    if isinstance(x, functools.partial):
        yield name, x.func
        yield from ((name, a) for a in x.args)
        yield from x.keywords.items()
    elif isinstance(x, types.MethodType | types.BuiltinMethodType):
        yield name, x.__self__
        yield name, getattr(x, "__func__", None)
    elif isinstance(x, types.FunctionType):
        yield from of_function(name, x)
    elif isinstance(x, staticmethod | classmethod):
        yield name, x.__func__
    elif isinstance(x, type):
        if own(x):
            yield from ((f"{x.__name__}.{n}", v) for n, v in vars(x).items() if not n.startswith("__"))
    elif isinstance(x, list | tuple | set):
        yield from ((f"{name}[...]", v) for v in x)
    elif isinstance(x, dict):
        yield from ((f"{name}[{k!r}]" if name else str(k), v) for k, v in x.items())
    elif isinstance(x, nn.Module) or (own(type(x)) and not isinstance(x, Tensor)):
        yield from ((n, v) for n, v in getattr(x, "__dict__", {}).items() if not n.endswith("_hooks"))
        yield type(x).__name__, type(x)


def of_function(name: str, fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
    if f"{torch.__path__[0]}/" in fn.__code__.co_filename:
        return  # torch.compile's wrapper and its like: what they hold is torch's
    for free, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # an empty cell
            yield free, cell.cell_contents
    yield from ((n, fn.__globals__[n]) for n in fn.__code__.co_names if own(fn.__globals__.get(n)))
    yield from ((name, d) for d in fn.__defaults__ or ())
    yield from (fn.__kwdefaults__ or {}).items()


def own(x: Any) -> bool:
    """Whether this is the user's: no module, and nothing of torch, NumPy or Python itself."""
    if x is None or isinstance(x, types.ModuleType):
        return False
    if isinstance(x, Tensor | nn.Module | list | dict | set | bytearray | tuple):
        return True
    module = getattr(x, "__module__", None) if isinstance(x, type | types.FunctionType) else type(x).__module__
    root = (module or "").partition(".")[0]
    if root == "torchcalc":
        return not (module or "").startswith("torchcalc.testing")
    return root not in LIBRARIES
