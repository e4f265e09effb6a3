"""What torch's older tracers make of our functions and modules: torch.fx records them as leaves, TorchScript refuses them.

Functions branch on shapes and dtypes, which ``torch.fx.symbolic_trace`` cannot follow, and it would write torch's operations
into the graph instead of our derivatives. So each is one node of the graph, as torch's own functions are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch.compiler import is_compiling
from torch.fx import Proxy, _symbolic_trace
from torch.fx.proxy import TracerBase

__all__ = ["NotScripted", "leaf", "tracer_of"]

#: torch's own is_fx_tracing() logs a warning at its first call.
is_fx_tracing: Callable[[], bool] = getattr(
    _symbolic_trace,
    "_get_is_fx_tracing",
    lambda: _symbolic_trace._is_fx_tracing_flag,  # from torch 2.14 on, and before
)

P = ParamSpec("P")
T = TypeVar("T")


def leaf(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which torch.fx records as one node.

    >>> import torch
    >>> twice = leaf(lambda x: 2 * x if x.dim() else x)
    >>> [node.op for node in torch.fx.symbolic_trace(lambda x: twice(x)).graph.nodes]
    ['placeholder', 'call_function', 'output']
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not is_compiling() and is_fx_tracing() and (tracer := tracer_of(args, kwargs)) is not None:
            node: Any = tracer.create_proxy("call_function", call, args, kwargs)
            return node
        return function(*args, **kwargs)

    return call


def tracer_of(args: Iterable[Any], kwargs: Mapping[str, Any] = {}) -> TracerBase | None:
    """What records these arguments symbolically, if something does."""
    if is_compiling() or not is_fx_tracing():
        return None
    return next((x.tracer for x in (*args, *kwargs.values()) if isinstance(x, Proxy)), None)


class NotScripted:
    """A module that TorchScript cannot compile: it has no derivatives but its own.

    torch would put what this hook returns in the module's place, in the model that is scripted too, so it returns nothing.
    """

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        stock = next(
            (f"torch.nn.{c.__name__}" for c in type(self).__mro__ if c.__module__.startswith("torch.nn.m")), ""
        )
        if stock == "torch.nn.Module":
            function = f".{name.lower()}" if hasattr(torch, name.lower()) else "'s functions"
            stock = f"a module of your own around torch{function}"
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__module__}.{name}, since TorchScript has no custom derivatives; "
            f"put {stock} in its place before scripting (its state_dict is the same), or use torch.compile or torch.export"
        )
