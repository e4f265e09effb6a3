"""What a function may keep between calls: the tensors and containers of its closure, globals, module and class."""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.subject import Subject

CONTAINERS = (list, dict, set, bytearray)
MOST = 4000  # objects that are looked at


def reachable(subject: Subject) -> list[tuple[str, Any]]:
    """Named tensors and containers that a function may keep: of its closure, its globals, its module and its class."""
    todo: list[tuple[str, Any, int]] = [("", subject.given, 0), ("", subject.fn, 0)]
    seen: set[int] = set()
    found: list[tuple[str, Any]] = []
    while todo and len(seen) < MOST:
        name, x, depth = todo.pop()
        if x is None or id(x) in seen or isinstance(x, (types.ModuleType, str, bytes, int, float, torch.dtype)):
            continue
        seen.add(id(x))
        if isinstance(x, (Tensor, *CONTAINERS)):
            found.append((name or "a default", x))
        todo += [(inner, value, depth + 1) for inner, value in parts(name, x) if depth < 8]
    return found


def parts(name: str, x: Any) -> list[tuple[str, Any]]:
    """What an object holds by name, as far as a function of the user's may keep something there."""
    if isinstance(x, partial):
        return [(name, x.func), *((name, a) for a in x.args), *x.keywords.items()]
    if isinstance(x, (types.MethodType, types.BuiltinMethodType)):
        return [(name, x.__self__), (name, getattr(x, "__func__", None))]
    if isinstance(x, types.FunctionType):
        cells = zip(x.__code__.co_freevars, x.__closure__ or (), strict=False)
        inside = [(n, cell.cell_contents) for n, cell in cells if cell_full(cell)]
        globals_ = [(n, x.__globals__[n]) for n in x.__code__.co_names if own(x.__globals__.get(n))]
        return [*inside, *globals_, *((name, d) for d in x.__defaults__ or ()), *(x.__kwdefaults__ or {}).items()]
    if isinstance(x, (staticmethod, classmethod)):
        return [(name, x.__func__)]
    if isinstance(x, type):
        if not own(x):
            return []
        return [(f"{x.__name__}.{n}", v) for n, v in vars(x).items() if not n.startswith("__")]
    if isinstance(x, (list, tuple, set)):
        return [(f"{name}[...]", v) for v in list(x)[:64]]
    if isinstance(x, dict):
        return [(f"{name}[{k!r}]" if name else str(k), v) for k, v in list(x.items())[:64]]
    if isinstance(x, (Tensor, torch.Generator)) or (not own(type(x)) and not isinstance(x, nn.Module)):
        return []
    kept = [(n, v) for n, v in getattr(x, "__dict__", {}).items() if not n.endswith("_hooks")]
    return [*kept, (type(x).__name__, type(x))]


def cell_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


def own(x: Any) -> bool:
    """Whether this is the user's: no module, and nothing of torch, NumPy or Python itself."""
    if x is None or isinstance(x, types.ModuleType):
        return False
    module = getattr(x, "__module__", None) if isinstance(x, (type, types.FunctionType)) else type(x).__module__
    root = (module or "").partition(".")[0]
    if isinstance(x, (Tensor, nn.Module, *CONTAINERS, tuple)):
        return True
    if root == "torchcalc":
        return not (module or "").startswith("torchcalc.testing")
    return root not in (
        "torch",
        "numpy",
        "builtins",
        "typing",
        "types",
        "functools",
        "itertools",
        "collections",
        "math",
        "abc",
    )
