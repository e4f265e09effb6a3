"""The function under test: a callable, example inputs, and what the checks ask of them.

A subject hides what differs between subjects, so that a check is a few lines: modules are called with their parameters
as further inputs, complex inputs are pairs of real ones, random functions start from the same seed at each call, and
only the outputs that carry a derivative are looked at. Everything drawn comes from a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchcalc.testing.graph import backward_of, custom, declared_once
from torchcalc.testing.handed import is_float, module_call, name_of, opened, parameters_of, refuse

__all__ = ["Subject", "is_float", "make_subject", "name_of", "normal"]

Call = Callable[..., Any]
Tensors = tuple[Tensor, ...]
# what an unsupported use may raise; others are slips
CLEAR = (NotImplementedError, RuntimeError, ValueError, TypeError, IndexError, AssertionError)

CALLERS_DEVICE: ContextVar[torch.device | None] = ContextVar("CALLERS_DEVICE", default=None)


def dense(x: Tensor) -> Tensor:
    return x if x.layout == torch.strided else x.to_dense()


def said(error: Exception) -> str:
    """The type and the first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def normal(like: Tensor, seed: int) -> Tensor:
    """Numbers of magnitude 0.5 to 1.5 and either sign, the same for the same seed, on any device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size = torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    sign = torch.randint(2, like.shape, generator=generator, device="cpu") * 2 - 1
    return (size * sign).to(like.device, like.dtype)


@dataclass(frozen=True)
class Subject:
    """A function under test and its example inputs.

    Attributes:
        name: for the report.
        fn: what is under test, a callable of the inputs.
        inputs: the example inputs as given; for a module, its parameters after them.
        names: what a report calls each input.
        wrt: indices of the inputs that are differentiated.
        reference: a callable of the same inputs to compare with, or None.
        refused: inputs that refuse to require a gradient, and what they say.
        kept: indices of the float outputs that carry a derivative; all of them, if none does.
        random: whether two calls differ, and the seed is therefore set at each call.
        exact: the dtype in which derivatives are checked: float64 where the function takes it.
        complex: indices of the inputs that are complex, given as pairs of real numbers.
        handed: how many inputs were handed in; those after them are a module's parameters.
        device: the caller's default device, where it is not the CPU: the function runs under it, the checks do not.
    """

    name: str
    fn: Call
    inputs: tuple[Any, ...]
    names: tuple[str, ...]
    wrt: tuple[int, ...]
    reference: Call | None = None
    refused: dict[int, str] = field(default_factory=dict)
    kept: tuple[int, ...] = (0,)
    random: bool = False
    exact: torch.dtype = torch.float64
    complex: tuple[int, ...] = ()
    given: Any = None  # what the user passed: a module, a partial, ...
    handed: int = 0
    backward_at: str = ""  # file and line of the backward, as far as there is one
    device: torch.device | None = None
    disturbed: tuple[str, ...] = ()  # global settings that the first calls changed
    drifts: bool = False  # whether calls from one seed differ
    nest: Callable[[Sequence[Any]], Sequence[Any]] | None = None  # the caller's lists and dicts, of their leaves
    once: bool = False  # whether a backward is declared once_differentiable
    custom: bool = True  # whether a custom Function is in its graph; without one, the derivatives are torch's own

    def fresh(self) -> Subject:
        """The same subject with inputs of its own."""
        return replace(self, inputs=tuple(x.clone() if isinstance(x, Tensor) else x for x in self.inputs))

    def floats(self, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """Copies of the inputs, the float ones in dtype (default: the exact one)."""
        dtype = dtype or self.exact
        return tuple(
            x.detach().to(dtype, copy=True) if is_float(x) else x.clone() if isinstance(x, Tensor) else x
            for x in self.inputs
        )

    def call(self, *inputs: Any, fn: Call | None = None) -> Tensors:
        """The outputs that carry derivatives, as a tuple of real tensors."""
        if self.random:
            reseed(inputs)
        if self.complex:
            inputs = tuple(
                torch.complex(x[..., 0], x[..., 1]) if i in self.complex else x for i, x in enumerate(inputs)
            )
        if self.nest is not None:
            inputs = (*self.nest(inputs[: self.handed]), *inputs[self.handed :])
        with self.device or nullcontext():
            found = [dense(t) for t in tree_leaves((fn or self.fn)(*inputs)) if is_float(t)]
        return tuple(
            torch.view_as_real(found[i].resolve_conj()) if found[i].is_complex() else found[i] for i in self.kept
        )

    def leaves(self, inputs: Sequence[Any], needed: Sequence[int]) -> list[Any]:
        """Copies, of which the needed ones are leaves that require a gradient."""
        return [
            x.detach().clone().requires_grad_(i in needed) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)
        ]

    def incoming(self, outputs: Sequence[Tensor], seed: int = 7) -> list[Tensor]:
        """A gradient for each output, uneven on purpose."""
        return [normal(y, seed + k) for k, y in enumerate(outputs)]

    def gradients(
        self,
        inputs: Sequence[Any],
        needed: Sequence[int] | None = None,
        incoming: Sequence[Tensor] | None = None,
        fn: Call | None = None,
        create_graph: bool = False,
    ) -> tuple[Tensors, tuple[Tensor | None, ...]]:
        """(outputs, J'v for each needed input, None where nothing came)."""
        needed = self.wrt if needed is None else needed
        leaves = self.leaves(inputs, needed)
        outputs = self.call(*leaves, fn=fn)
        grads = pull(outputs, [leaves[i] for i in needed], incoming or self.incoming(outputs), create_graph)
        return tuple(y.detach() for y in outputs), grads

    def label(self, i: int) -> str:
        return f"input {i}" + (f" ({self.names[i]})" if self.names[i] else "")

    def option(self, name: str, default: Any = None) -> Any:
        """The value that the subject has for an option such as ignore_index; the default if it has none."""
        if isinstance(self.given, nn.Module):
            return getattr(self.given, name, default)
        if isinstance(self.given, partial) and name in self.given.keywords:
            return self.given.keywords[name]
        parameter = parameters_of(self.given).get(name)
        return default if parameter is None or parameter.default is parameter.empty else parameter.default

    def has_option(self, name: str) -> bool:
        if isinstance(self.given, nn.Module):
            return hasattr(self.given, name)
        return name in parameters_of(self.given)

    def with_option(self, **options: Any) -> Subject:
        """The same function with other options: attributes of a module, keyword arguments of a function."""
        if not isinstance(self.given, nn.Module):
            fn = partial(self.given, **options)
            return replace(self, fn=fn, given=fn)
        module = self.given
        old = {name: getattr(module, name) for name in options}

        def call(*inputs: Any) -> Any:
            try:
                for name, value in options.items():
                    setattr(module, name, value)
                return self.fn(*inputs)
            finally:
                for name, value in old.items():
                    setattr(module, name, value)

        return replace(self, fn=call)


def reseed(inputs: Sequence[Any]) -> None:
    """Seed the generators that a call may draw from; the caller of the checks gets them back as they were."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks every backend, slowly
    if any(isinstance(x, Tensor) and x.is_cuda for x in inputs):
        torch.cuda.manual_seed(0)


def pull(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], incoming: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """J'v; outputs without a graph contribute nothing."""
    pairs = [(y, v) for y, v in zip(outputs, incoming, strict=True) if y.requires_grad]
    if not pairs or not leaves:
        return (None,) * len(leaves)
    ys, vs = zip(*pairs, strict=True)
    try:
        grads = torch.autograd.grad(ys, leaves, vs, create_graph=create_graph, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error) or create_graph:
            raise
        torch.autograd.backward(ys, vs, retain_graph=True)  # reentrant checkpointing knows no other way
        grads = tuple(x.grad for x in leaves)  # type: ignore[misc]
        for x in leaves:
            x.grad = None
    return tuple(None if g is None else dense(g) for g in grads)


def dot(xs: Sequence[Tensor | None], ys: Sequence[Tensor], like: Tensor) -> Tensor:
    """Σ <x, y>, None being zero."""
    return sum(((x * y).sum() for x, y in zip(xs, ys, strict=True) if x is not None), like.new_zeros(()))


def make_subject(
    fn: Any, inputs: Sequence[Any], reference: Any = None, wrt: Sequence[int] | None = None, name: str | None = None
) -> Subject:
    """Look at a callable and its inputs: what is differentiable, random, complex, and whether it takes float64.

    Raises:
        ValueError: no input is a float tensor, one is sparse or has no values, or ``wrt`` names one that is not.
    """
    given, count = fn, len(inputs)
    names = [n for n, p in parameters_of(fn).items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    inputs, names, nest = opened(inputs, [*names, *[""] * count][:count])
    handed = len(inputs)
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor):
            refuse(i, x)
    inputs = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    if isinstance(fn, nn.Module):
        parameters = dict(fn.named_parameters())
        names += parameters
        inputs += [p.detach().clone() for p in parameters.values()]
        fn = module_call(fn, count)
        reference = module_call(reference, count) if isinstance(reference, nn.Module) else reference
    floats = [i for i, x in enumerate(inputs) if is_float(x)]
    if not floats:
        raise ValueError("no example input is a float tensor, so there is nothing to differentiate; give at least one")
    if wrt is not None and not set(wrt) <= set(floats):
        raise ValueError(f"wrt={tuple(wrt)} names an input that is no float tensor; float tensors are {tuple(floats)}")
    complex_ = tuple(i for i in floats if inputs[i].is_complex())
    inputs = [torch.view_as_real(x.resolve_conj()) if i in complex_ else x for i, x in enumerate(inputs)]
    subject = Subject(
        name or name_of(given), fn, tuple(inputs), tuple(names), tuple(floats if wrt is None else wrt), reference,
        complex=complex_, given=given, handed=handed, device=CALLERS_DEVICE.get(), nest=nest,
    )  # fmt: skip
    return probe(subject)


def probe(subject: Subject) -> Subject:
    """Fill in what only calling tells: exact, random, kept, refused."""
    try:
        subject.call(*subject.floats())
    except CLEAR:
        exact = next(x.dtype for x in subject.inputs if is_float(x))
        subject = replace(subject, exact=exact)  # takes no float64; if it takes nothing, this raises
    kept = tuple(range(len([t for t in tree_leaves(raw(subject)) if is_float(t)])))
    subject = replace(subject, kept=kept)
    first, second = subject.call(*subject.floats()), subject.call(*subject.floats())
    subject = replace(subject, random=not all(map(same, first, second)))
    if subject.random:
        first, second = subject.call(*subject.floats()), subject.call(*subject.floats())
        subject = replace(subject, drifts=not all(map(same, first, second)))
    refused = {}
    for i in subject.wrt:
        try:
            subject.call(*subject.leaves(subject.floats(), (i,)))
        except CLEAR as error:
            refused[i] = str(error).partition("\n")[0]
    wrt = tuple(i for i in subject.wrt if i not in refused)
    outputs = subject.call(*subject.leaves(subject.floats(), wrt))
    carrying = tuple(i for i in kept if outputs[i].requires_grad)
    return replace(
        subject, wrt=wrt, refused=refused, kept=carrying or kept, backward_at=backward_of(outputs),
        once=declared_once(outputs), custom=custom(outputs),
    )  # fmt: skip


def raw(subject: Subject) -> Any:
    result: Any = None

    def call(*inputs: Any) -> Any:
        nonlocal result
        result = subject.fn(*inputs)
        return ()

    replace(subject, kept=()).call(*subject.floats(), fn=call)
    return result


def same(x: Tensor, y: Tensor) -> bool:
    """Equal to the last bit, NaN equal to NaN."""
    return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())
