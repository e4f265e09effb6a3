"""One definition of a differentiable function, right under every transform of torch.

A subclass of :class:`Function` is written once, in the ``setup_context`` style of ``torch.autograd.Function``:
``forward`` computes, ``setup_context`` saves, ``backward`` is the vector-Jacobian product and ``jvp`` the
Jacobian-vector product. :meth:`Function.apply` then picks the form that fits the call:

- eager mode: one ``forward(ctx, ...)`` built from forward and setup_context. torch's own ``setup_context`` form costs
  10 µs more a call, nearly all of it in ``inspect.signature``.
- ``torch.func`` (grad, vmap, jvp, hessian, ...) and forward-mode AD: the ``setup_context`` form with a generated vmap
  rule and the jvp, the only one that composes.
- ``torch.compile`` and ``export``: Dynamo puts the whole call into its graph, and AOTAutograd traces through it, so the
  two forms above serve there too. Constants that the definition reads from elsewhere are guarded; where it reads
  anything else that may change, or leaves torch, the graph breaks (:mod:`torchcalc._dynamo`). Left to itself Dynamo
  refuses a Function with a jvp, and under compile and ``torch.func`` together it drops a custom backward without a word.
- ``torch.autocast``: by the policy ``autocast`` of the subclass.

What cannot be right raises: a backward (or jvp) that returns None for a derivative somebody waits for, a backward under
``once_differentiable`` (whose second derivative is zero in ``torch.autograd.functional.hessian``).
"""

import functools
import inspect
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    maybe_get_level,
)
from torch.autograd import forward_ad

from torchcalc.casts import cast as cached_cast
from torchcalc.tracing import tracer_of

__all__ = ["Function"]

_CONTAINERS = (list, tuple, dict)

Autocast = Literal["inherit", "off", "lower_precision", "float32"]


class Function:
    """A differentiable function with hand-written derivatives; subclass it as you would ``torch.autograd.Function``.

    Define static methods:

    - ``forward(*args)``: the value, a tensor or a tuple of tensors. Arguments are tensors, None, or anything else. If
      it has a keyword-only parameter ``needs_input_grad``, it is told there which inputs need a derivative now (a
      tuple of bool, one for each argument), so that it can compute a gradient on the way, or skip that. By itself
      forward cannot know: it runs with grad mode off, sees ``requires_grad=True`` under ``no_grad`` and ``False``
      inside ``torch.func.grad``.
    - ``setup_context(ctx, inputs, output)``: save what backward needs: tensors that are inputs or outputs with
      ``ctx.save_for_backward`` (it serves jvp too), everything else as an attribute of ctx.
    - ``backward(ctx, *grad_outputs)``: one gradient for each argument of forward, defaults included, None for those
      that need none (``ctx.needs_input_grad[i]`` tells). Written with differentiable operations, it is differentiated
      for second derivatives.
    - ``jvp(ctx, *tangents)``, optional: the tangent of each output, for forward-mode AD; a tangent is None where the
      argument is not a float tensor.
    - ``vmap(info, in_dims, *args)``, optional: instead of the generated vmap rule, as in torch.

    Class attribute ``autocast``, what happens under ``torch.autocast``:

    - ``"inherit"`` (default): forward runs in the caller's autocast state, backward re-enters it;
    - ``"off"``: the inputs as they are, autocast off inside (torch's elementwise functions);
    - ``"lower_precision"``: float inputs are cast to the autocast dtype (torch's linear, matmul, conv);
    - ``"float32"``: float inputs are cast to float32 (torch's losses, norms and softmax); float64 is left alone.

    Raises, when the subclass is created: TypeError if the definition cannot work. When called: RuntimeError if
    backward or jvp returns None for a derivative that is needed; ValueError if setup_context saves a float tensor that
    is neither input nor output, which second derivatives would take for a constant; TypeError if a tensor stands in a
    list, tuple or dict among the arguments or outputs, where torch would not see it.

    >>> class Cube(Function):
    ...     autocast = "off"
    ...
    ...     @staticmethod
    ...     def forward(x):
    ...         return x**3
    ...
    ...     @staticmethod
    ...     def setup_context(ctx, inputs, output):
    ...         ctx.save_for_backward(*inputs)
    ...
    ...     @staticmethod
    ...     def backward(ctx, grad_output):
    ...         (x,) = ctx.saved_tensors
    ...         return grad_output * 3 * x**2
    ...
    ...     jvp = backward  # elementwise: the Jacobian is diagonal, and so its own transpose
    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> torch.autograd.grad(Cube.apply(x), x)
    (tensor(12.),)
    >>> torch.func.hessian(Cube.apply)(x.detach())
    tensor(12.)
    """

    autocast: ClassVar[Autocast] = "inherit"

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:  # mypy lets this be overridden by any signature
        """The value."""
        raise NotImplementedError("a torchcalc.autograd.Function needs a static method forward(*args)")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save for backward and jvp; by default nothing."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """The vector-Jacobian product."""
        raise NotImplementedError("a torchcalc.autograd.Function needs a static method backward(ctx, *grad_outputs)")

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Any:
        """Call the function on forward's arguments; replaced in each subclass by the callable described above."""
        raise NotImplementedError("apply is called on a subclass of torchcalc.autograd.Function")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_definition(cls)
        cls.apply = staticmethod(_make_apply(cls))  # type: ignore[method-assign]


def _check_definition(cls: type[Function]) -> None:
    for name in ("forward", "setup_context", "backward", "jvp", "vmap"):
        method = inspect.getattr_static(cls, name, None)
        if method is not None and not isinstance(method, staticmethod):
            raise TypeError(f"{cls.__name__}.{name} must be a static method; put @staticmethod above it")
    if next(iter(inspect.signature(cls.forward).parameters), None) == "ctx":
        raise TypeError(
            f"{cls.__name__}.forward takes ctx; write forward(*args) without it, and save for backward in "
            "setup_context(ctx, inputs, output)"
        )
    backward: Any = cls.backward
    if hasattr(backward, "__wrapped__") and backward.__globals__.get("__name__") == "torch.autograd.function":
        raise TypeError(
            f"{cls.__name__}.backward is decorated with once_differentiable, under which a second derivative can be "
            "silently zero; write backward with differentiable operations, or raise in it when torch.is_grad_enabled()"
        )
    if cls.autocast not in get_args(Autocast):
        raise TypeError(f"{cls.__name__}.autocast is {cls.autocast!r}; use one of {get_args(Autocast)}")


def _make_apply(cls: type[Function]) -> Callable[..., Any]:
    """The callable that picks the form; forms are closed over, since Dynamo cannot reach a Function as an attribute."""
    parameters = inspect.signature(cls.forward).parameters.values()
    tells = any(p.name == "needs_input_grad" for p in parameters)
    defaults = tuple(p.default for p in parameters if p.default is not p.empty and p.kind == p.POSITIONAL_OR_KEYWORD)
    arity = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    policy = cls.autocast
    eager, composable = _make_forms(cls, tells)

    def call(*args: Any) -> Any:
        if (tracer := tracer_of(args)) is not None:
            return tracer.create_proxy("call_function", apply, args, {})
        for i, a in enumerate(args):
            if isinstance(a, _CONTAINERS) and _holds_tensor(a):
                raise TypeError(
                    f"argument {i} of {cls.__name__}.apply is a {type(a).__name__} that holds a tensor, which gets "
                    "no gradient; pass each tensor as an argument of its own"
                )
        if 0 < arity - len(args) <= len(defaults):  # as torch's setup_context form: backward counts all arguments
            args = (*args, *defaults[len(args) - arity :])
        composes = _are_functorch_transforms_active() or forward_ad._current_level >= 0
        if tells:
            args = (*args, _needs_mask(args, composes))
        if _is_any_autocast_enabled() and policy != "inherit":
            state = _autocast_state(args)
            args = _cast(policy, args, state, composes)
            with _autocast_off(state):
                return _composed(composable, args) if composes else eager.apply(*args)
        return _composed(composable, args) if composes else eager.apply(*args)

    place = next(_places)
    readers: list[Callable[[], Any]] = []
    traced = [call]

    names = tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD)
    first_name = arity - len(names)  # those before can be given by position only

    def apply(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args = _in_order(cls.__name__, args, kwargs, names, first_name, defaults)
        if torch.compiler.is_compiling():
            from torchcalc._dynamo import admit  # Dynamo runs this import while it traces: see there

            for value, read in zip(admit("place"), readers, strict=True):
                if read() != value:  # never: Dynamo guards what it compares
                    raise AssertionError
            return traced[0](*args)
        return call(*args)

    # Dynamo tells closures apart by their code alone: with one code object for all, what it compiled for one Function
    # would serve the others, without a word. replace() makes another.
    for function in (call, apply):
        function.__name__ = function.__qualname__ = f"{cls.__name__}_apply"
        code = function.__code__
        constants = tuple(place if c == "place" else c for c in code.co_consts)  # what Dynamo takes for one at once
        function.__code__ = code.replace(co_name=function.__name__, co_consts=constants)
    apply.__module__, apply.__qualname__ = cls.__module__, f"{cls.__qualname__}.apply"  # so that it can be pickled
    functions[place] = apply.known = Known(cls, readers, traced)  # type: ignore[attr-defined]
    return apply


def _in_order(
    function: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: tuple[str, ...],
    first: int,
    defaults: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The arguments by position, as torch counts them. names are those from place `first` on; of the last there are defaults."""
    named = dict(zip(names[: max(len(args) - first, 0)], args[first:], strict=False))
    optional = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) if defaults else {}
    for name, value in kwargs.items():
        if name in named:
            raise TypeError(f"{function}.apply got two values for argument {name!r}; leave one out")
        if name not in names:
            raise TypeError(f"{function}.apply has no argument {name!r}; its forward takes {', '.join(names)}")
        named[name] = value
    wanted = names[: max(names.index(name) for name in named) + 1]
    missing = [name for name in wanted if name not in named and name not in optional]
    if missing or len(args) < first:
        raise TypeError(
            f"{function}.apply lacks {', '.join(missing) or 'arguments that are given by position'}; pass them"
        )
    return (*args[:first], *(named[name] if name in named else optional[name] for name in wanted))


@dataclass
class Known:
    """A Function, for torchcalc._dynamo."""

    cls: type[Function]
    readers: list[Callable[[], Any]]  # of the constants that it reads from elsewhere
    traced: list[Callable[..., Any]]  # one: what Dynamo calls
    admitted: bool = False


functions: WeakValueDictionary[int, Known] = WeakValueDictionary()
_places = itertools.count()


def _make_forms(cls: type[Function], tells: bool) -> tuple[Any, Any]:
    """(eager, composable): the methods of cls as two torch.autograd.Functions.

    Where forward is told ``needs_input_grad``, both take it as one more argument, a bit mask, which the other methods
    of cls never see.
    """
    forward, setup_context = cls.forward, cls.setup_context
    if tells:

        def forward(*arguments: Any) -> Any:
            *args, mask = arguments
            return cls.forward(*args, needs_input_grad=_unpack(mask, len(args)))

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            cls.setup_context(ctx, inputs[:-1], output)

    inherits = cls.autocast == "inherit"
    has_jvp = hasattr(cls, "jvp")

    def forward_eager(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        outputs = _outputs(cls, output)
        setup_context(ctx, args, output)
        _check_saved(cls, ctx, args, outputs)
        if inherits and _is_any_autocast_enabled():
            ctx._torchcalc_autocast = _autocast_state(args)
        return output

    def forward_composable(*args: Any) -> Any:
        output = forward(*args)
        _outputs(cls, output)
        return output

    def setup_context_composable(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)
        if inherits and _is_any_autocast_enabled():
            ctx._torchcalc_autocast = _autocast_state(inputs)
        root = ctx
        while hasattr(root, "_pt_inner_ctx"):  # torch's wrapper under vmap, which has noted the batch dimensions
            root = root._pt_inner_ctx
        if has_jvp:
            root.save_for_forward(*(root.to_save or ()))
        outputs = _outputs(cls, output)
        if root is ctx:
            _check_saved(cls, ctx, inputs, outputs)
        constant = {id(o) for o in root.non_differentiable or ()}
        ctx._torchcalc_differentiable = _last.differentiable = tuple(
            _is_float(o) and id(o) not in constant for o in outputs
        )

    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        state = getattr(ctx, "_torchcalc_autocast", None)
        if state is not None or _is_any_autocast_enabled():
            with _autocast(state) if state is not None else _autocast_off(_autocast_state(grad_outputs)):
                grads = cls.backward(ctx, *grad_outputs)
        else:
            grads = cls.backward(ctx, *grad_outputs)
        if not isinstance(grads, tuple):
            grads = (grads,)
        for i, (grad, needed) in enumerate(zip(grads, ctx.needs_input_grad, strict=False)):
            if grad is None and needed:
                _refuse_none(cls, "backward", "gradient", i, grad_outputs)
        return (*grads, None) if tells else grads

    def jvp(ctx: Any, *tangents: Any) -> Any:
        result = cls.jvp(ctx, *(tangents[:-1] if tells else tangents))  # type: ignore[attr-defined]
        for i, tangent in enumerate(result if isinstance(result, tuple) else (result,)):
            if tangent is None and ctx._torchcalc_differentiable[i]:
                _refuse_none(cls, "jvp", "tangent", i, tangents)
        return result

    shared = {"backward": staticmethod(backward), "__doc__": cls.__doc__, "__module__": cls.__module__}
    eager = type(cls.__name__, (torch.autograd.Function,), {**shared, "forward": staticmethod(forward_eager)})
    composes: dict[str, Any] = {
        "forward": staticmethod(forward_composable),
        "setup_context": staticmethod(setup_context_composable),
        "generate_vmap_rule": not hasattr(cls, "vmap"),
    }
    if has_jvp:
        composes["jvp"] = staticmethod(jvp)
    if hasattr(cls, "vmap"):

        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
            n = len(args) - tells
            return cls.vmap(info, in_dims[:n], *args[:n])

        composes["vmap"] = staticmethod(vmap)
    return eager, type(cls.__name__, (torch.autograd.Function,), {**shared, **composes})


class _Last(threading.local):
    """Which outputs of the composable call that returns next are differentiable; empty if nothing is differentiated."""

    differentiable: tuple[bool, ...] = ()

    def take(self) -> tuple[bool, ...]:
        flags, self.differentiable = self.differentiable, ()
        return flags


_last = _Last()


def _composed(composable: Any, args: tuple[Any, ...]) -> Any:
    """composable.apply, with its non-differentiable outputs detached: the generated vmap rule forgets that mark."""
    _last.take()
    output = composable.apply(*args)
    flags = _last.take()
    if not flags or all(flags):
        return output
    if not isinstance(output, tuple):
        return output.detach() if _is_float(output) else output
    return tuple(o.detach() if _is_float(o) and not flag else o for o, flag in zip(output, flags, strict=True))


def _refuse_none(cls: type[Function], method: str, what: str, i: int, incoming: tuple[Any, ...]) -> None:
    """Raise, unless nothing came in: then None is the truth."""
    if all(x is None for x in incoming):
        return
    if method == "backward":
        parameters = inspect.signature(cls.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        where = f"argument {i}" + (f" ({names[i]})" if i < len(names) else "")
        remedy = "detach the argument before the call"
    else:
        where, remedy = f"output {i}", "mark the output with ctx.mark_non_differentiable"
    raise RuntimeError(
        f"{cls.__name__}.{method} returned None as the {what} of {where}, which is needed; return the {what} "
        f"(zeros where the derivative is zero), or {remedy}"
    )


def _outputs(cls: type[Function], output: Any) -> tuple[Any, ...]:
    """The outputs; torch gives a gradient to tensors only where they are the output or an element of a tuple."""
    if isinstance(output, Tensor):
        return (output,)
    outputs: tuple[Any, ...] = output if isinstance(output, tuple) else (output,)
    for o in outputs:
        if isinstance(o, _CONTAINERS):
            raise TypeError(
                f"{cls.__name__}.forward returned a {type(o).__name__}; return a tensor or a flat tuple of tensors"
            )
    return outputs


def _check_saved(cls: type[Function], ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Refuse what setup_context computed: it is a constant there, so the second derivative would lack its part."""
    saved_tensors = ctx.to_save or ()
    if not saved_tensors:
        return
    known = {*map(id, inputs), *map(id, outputs)}
    for saved in saved_tensors:
        if id(saved) not in known and _is_float(saved):
            raise ValueError(
                f"{cls.__name__}.setup_context saved a tensor of shape {tuple(saved.shape)} that is neither an "
                "input nor an output, so that second derivatives would take it for a constant; compute it in "
                "backward, or return it from forward as well"
            )


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _holds_tensor(x: Any) -> bool:
    if isinstance(x, dict):
        x = tuple(x.values())
    return any(map(_holds_tensor, x)) if isinstance(x, _CONTAINERS) else isinstance(x, Tensor)


def _needs_mask(args: tuple[Any, ...], composes: bool) -> int:
    """Bit i is set if argument i needs a derivative now; inside torch.func, if any level might ask for one."""
    if composes:
        interpreters = {i.level(): i.key() for i in get_interpreter_stack() or ()}
        return sum(1 << i for i, a in enumerate(args) if _is_float(a) and _tracked(a, interpreters))
    mask = 0
    if torch.is_grad_enabled():
        for i, a in enumerate(args):
            if isinstance(a, Tensor) and a.requires_grad:
                mask |= 1 << i
    return mask


@functools.cache
def _unpack(mask: int, n: int) -> tuple[bool, ...]:
    return tuple(bool(mask >> i & 1) for i in range(n))


def _tracked(x: Tensor, interpreters: dict[int, TransformType]) -> bool:
    reverse = torch.is_grad_enabled()
    while is_functorch_wrapped_tensor(x):
        if (reverse and x.requires_grad) or interpreters.get(maybe_get_level(x)) == TransformType.Jvp:
            return True
        x = get_unwrapped(x)
    if reverse and x.requires_grad:
        return True
    if forward_ad._current_level < 0 or TransformType.Jvp in interpreters.values():
        return False  # the level is torch.func's: of its inputs it has wrapped those that have a tangent
    # a dual tensor hides its tangent from vmap, which has no rule for unpacking
    return bool(interpreters) or forward_ad.unpack_dual(x).tangent is not None


def _device_types(args: tuple[Any, ...]) -> list[str]:
    types = dict.fromkeys(a.device.type for a in args if isinstance(a, Tensor))
    return [t for t in types if torch.amp.is_autocast_available(t)]


_State = list[tuple[str, bool, torch.dtype]]  # (device type, enabled, dtype)


def _autocast_state(args: tuple[Any, ...]) -> _State:
    return [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in _device_types(args)]


def _autocast(state: _State) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for device_type, enabled, dtype in state:
        stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled))
    return stack


def _autocast_off(state: _State) -> AbstractContextManager[Any]:
    return _autocast([(device_type, False, dtype) for device_type, enabled, dtype in state if enabled])


def _cast(policy: Autocast, args: tuple[Any, ...], state: _State, composes: bool) -> tuple[Any, ...]:
    """The inputs in the dtype that torch gives to its own operations; float64 stays, as there."""
    if policy == "off":
        return args
    dtypes = {
        device_type: dtype if policy == "lower_precision" else torch.float32 for device_type, on, dtype in state if on
    }

    def cast(a: Any) -> Any:
        if not isinstance(a, Tensor) or not a.is_floating_point() or a.dtype == torch.float64:
            return a
        to = dtypes.get(a.device.type, a.dtype)
        return cached_cast(a, to) if policy == "lower_precision" and not composes else a.to(to)

    return tuple(map(cast, args))
