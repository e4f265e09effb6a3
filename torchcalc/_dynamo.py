"""Makes Functions known to torch.compile, and what they read with them. Called while Dynamo traces ``Function.apply``.

``allow_in_graph`` puts the call of a Function into the graph as it is: Dynamo does not look inside, and sets no guards. So
this module looks, at the code of forward, setup_context, backward, jvp and vmap, and of the Python functions that they call:

- a global, closure variable or class attribute that is a number, a string or another constant is compared with its value
  of now while Dynamo traces, which makes it guard it: another value compiles anew (a class attribute from torch 2.13 on:
  before, Dynamo guards none);
- where something else is read (a list, a tensor, an object), or numbers leave torch (``.item()``, NumPy), the graph breaks,
  and the Function runs as it does without torch.compile; with ``fullgraph=True`` that raises, and says why.

It is imported by Dynamo itself: ``allow_in_graph`` imports Dynamo, which takes a second, so it cannot stand at the definition
of each Function, but Dynamo executes an import that it meets while tracing.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import inspect
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

from torchcalc import autograd
from torchcalc.formula.pointwise import Formula

__all__ = ["admit"]

#: Modules whose functions depend on their arguments alone, as far as a graph is concerned.
PURE = {
    "_operator", "abc", "builtins", "cmath", "collections", "contextlib", "enum", "functools", "itertools", "math", "operator",
    "torch", "torchcalc", "typing", "warnings",
    "_pytest",  # which an assert calls in a test
}  # fmt: skip
CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
LEAVING = {"numpy", "item", "tolist"}  # methods that take numbers out of tensors
BUILTINS = {"eval", "exec", "globals", "locals", "vars", "input", "open"}  # may read anything
GUARDS_CLASSES = torch.__version__ >= "2.13"
METHODS = ("forward", "setup_context", "backward", "jvp", "vmap")

Reader = Callable[[], Any]


class Unguarded(Exception):
    """What a Function reads, and Dynamo could not guard; in words."""


@torch._dynamo.assume_constant_result  # Dynamo runs it, each time that it traces a call
def admit(place: int) -> tuple[Any, ...]:
    """Make the Function known to Dynamo; the values of now of all constants that it reads, in the order of its readers."""
    known = autograd.functions[place]
    if not known.admitted:
        known.admitted = True
        try:
            known.readers.extend(_readers(known.cls))
        except Unguarded as found:
            why = (
                f"{known.cls.__name__}{found}, which torch.compile would not see change; pass it as an argument, or "
                "compile without fullgraph=True"
            )
            known.traced[0] = torch.compiler.disable(known.traced[0], reason=why)
        else:
            torch.compiler.allow_in_graph(known.traced[0])
    return tuple(read() for read in known.readers)


def _readers(cls: type) -> list[Reader]:
    """One for each constant that the Function reads; raises Unguarded."""
    readers: list[Reader] = []
    seen: set[Any] = set()
    _look_at_class(cls, seen, readers)
    return readers


def _look_at_class(cls: type, seen: set[Any], readers: list[Reader]) -> None:
    for name in METHODS:
        method = getattr(cls, name, None)
        if method is not None:
            _look(method, f".{name}", seen, readers)


def _look(value: Any, where: str, seen: set[Any], readers: list[Reader]) -> None:
    """At what is called, or handed on, somewhere in the code of a Function."""
    if isinstance(value, functools.partial):
        for each in (value.func, *value.args, *value.keywords.values()):
            if not _is_constant(each):
                _look(each, where, seen, readers)
    elif isinstance(value, Formula):
        for each in (value.value, *value.slopes):
            if each is not None:
                _look(each, where, seen, readers)
    elif isinstance(value, FunctionType):
        if value in seen:
            return
        seen.add(value)
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        if isinstance(known := getattr(value, "known", None), autograd.Known):  # an apply
            return _look_at_class(known.cls, seen, readers)
        if _root(value) in PURE:  # but not what it was made from
            for cell in cells.values():
                if isinstance(content := _content(cell), (functools.partial, Formula, FunctionType)):
                    _look(content, where, seen, readers)
            return
        for default in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            if not _is_constant(default) and not isinstance(default, (type, FunctionType)):
                raise Unguarded(f"{where} has a default argument of type {type(default).__name__}")
        for chain in _chains(value.__code__):
            _look_along(chain, value, cells, where, seen, readers)
    elif not isinstance(value, type) and not (isinstance(value, BuiltinFunctionType) and _root(value) in PURE):
        raise Unguarded(f"{where} uses {value!r:.60}, of type {type(value).__name__}")


def _look_along(
    chain: list[str], function: FunctionType, cells: dict[str, Any], where: str, seen: set[Any], readers: list[Reader]
) -> None:
    """At what a name, followed by attributes, means in the function."""
    name, *attributes = chain
    if name in cells:
        value = _content(cells[name])
    elif name in function.__globals__:
        value = function.__globals__[name]
    else:
        if name in BUILTINS:
            raise Unguarded(f"{where} calls {name}()")
        value = getattr(builtins, name, cells)
    if value is cells:
        return  # not defined yet: nothing to read
    path, guarded = [name], True
    for attribute in attributes:
        if not isinstance(value, (ModuleType, type)):
            break
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in PURE:
            return
        guarded = guarded and (GUARDS_CLASSES or not isinstance(value, type) or issubclass(value, enum.Enum))
        value = getattr(value, attribute, None)
        path.append(attribute)
    spelled = ".".join(path)
    if _is_constant(value):
        if not guarded:
            raise Unguarded(f"{where} reads {spelled}, a class attribute")
        if value is not getattr(builtins, name, cells):
            readers.append(_reader(spelled, function, cells))
    elif isinstance(value, ModuleType):
        if value.__name__.partition(".")[0] not in PURE:
            raise Unguarded(f"{where} uses {spelled}")
    elif isinstance(value, (type, FunctionType, BuiltinFunctionType, functools.partial, Formula)):
        try:
            _look(value, where, seen, readers)
        except Unguarded as found:
            raise Unguarded(str(found) if isinstance(value, FunctionType) else f"{where} uses {spelled}") from None
    else:
        raise Unguarded(f"{where} reads {spelled}, of type {type(value).__name__}")


def _chains(code: CodeType) -> Iterator[list[str]]:
    """Each global or closure variable that the code loads, with the attributes that it takes of it at once."""
    chain: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname in ("CACHE", "EXTENDED_ARG", "NOP", "PUSH_NULL"):
            continue
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if step.argval in LEAVING:
                raise Unguarded(f" calls .{step.argval}()")
            if chain:
                chain.append(step.argval)
                continue
        if chain:
            yield chain
            chain = []
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") or (
            step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and step.argval in code.co_freevars
        ):
            chain = [step.argval]
        elif step.opname == "STORE_GLOBAL" or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars):
            raise Unguarded(f" writes {step.argval}")
        elif step.opname == "IMPORT_NAME" and step.argval.partition(".")[0] not in PURE:
            raise Unguarded(f" imports {step.argval}")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function or comprehension inside
            yield from (c for c in _chains(constant) if c[0] not in code.co_cellvars)


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    return isinstance(value, CONSTANTS) and value == value  # a nan would never be equal to itself


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet defined
        return None


def _reader(expression: str, function: FunctionType, cells: dict[str, Any]) -> Reader:
    """The expression as the function sees it: through the same globals and the same cells."""
    name = expression.partition(".")[0]
    given = name if name in cells else ""
    source = f"def make({given}):\n def read():\n  return {expression}\n return read"
    make = next(c for c in compile(source, "<torchcalc>", "exec").co_consts if isinstance(c, CodeType))
    read = next(c for c in make.co_consts if isinstance(c, CodeType))
    return FunctionType(read, function.__globals__, "read", None, tuple(cells[n] for n in read.co_freevars))


def _root(value: Any) -> str:
    """The package that a function is from."""
    module = getattr(value, "__module__", None) or getattr(inspect.getmodule(type(value.__self__)), "__name__", "")
    if not getattr(value, "__module__", None):  # a method of a builtin object: torch.sigmoid, math.exp
        owner = value.__self__
        module = owner.__name__ if isinstance(owner, ModuleType) else getattr(owner, "__module__", "") or module
    return str(module).partition(".")[0]
