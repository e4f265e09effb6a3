"""What the derivatives ask of functions, and of second derivatives, before they answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_current_level, maybe_get_level
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from torchcalc.calculus.hessian_product import HessianProduct
from torchcalc.calculus.operations import foreign, leaves, once
from torchcalc.calculus.random_numbers import random_numbers_kept

__all__ = [
    "constant",
    "exact",
    "guarded",
    "mark",
    "need_second",
    "need_second_if_nested",
    "normal",
    "scalar",
    "tensor",
    "variable",
]

Function = Callable[..., Any]

ADVICE = (
    ". Make its backward differentiable, or use torchcalc.calculus.curvature and curvature_along, which fall back to "
    "differences of gradients"
)


def tensor(f: Function) -> Function:
    """f, which must return a tensor."""

    def g(*args: Any) -> Tensor:
        y = f(*args)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"f returned a {type(y).__name__}, which has no derivative; return a tensor, and use torch.sin, not math.sin"
            )
        if y.is_complex():
            raise TypeError(f"f returned {y.dtype}; derivatives need real values: take torch.view_as_real of it")
        return y

    return g


def scalar(f: Function) -> Function:
    """f, which must return one element; it is returned as a 0-d tensor."""

    def g(*args: Any) -> Tensor:
        y = tensor(f)(*args)
        if y.numel() != 1:
            raise ValueError(
                f"f returned shape {tuple(y.shape)}; a gradient needs a scalar: take .sum(), or jacobian(f)"
            )
        return y.reshape(())

    return g


def mark(g: Function, f: Function) -> Function:
    """Note that g is a derivative of f."""
    g.derivative_of = f  # type: ignore[attr-defined]
    return g


def need_second_if_nested(f: Function, x: Any, call: Function = lambda g, x: g(x)) -> None:
    """A derivative of a derivative is one of second order."""
    if hasattr(f, "derivative_of"):
        while hasattr(f, "derivative_of"):
            f = f.derivative_of
        need_second(lambda x: call(f, x), x)


def need_second(f: Function, x: Any) -> None:
    """Raise where an operation has lost its second derivative, or has a wrong one."""
    if _are_functorch_transforms_active():
        return  # nothing can be compared there; what can be seen, guarded() sees

    xs, structure = tree_flatten(x)
    at = {str(i): t for i, t in enumerate(xs)}

    def weighted(at: dict[str, Tensor]) -> Tensor:
        y = tensor(f)(tree_unflatten(list(at.values()), structure))
        return (y * normal(y)).sum()

    with torch.inference_mode(False), torch.enable_grad():
        y = weighted({k: variable(t) for k, t in at.items()})
    if y.requires_grad:
        product = HessianProduct(weighted, at)
        exact(product, normal(torch.zeros(product.size, dtype=product.dtype, device=product.device)))


def constant(f: Function, x: Any) -> None:
    """Raise unless f, in whose graph x is not, is constant around x: a value taken out of the graph has no derivative."""
    xs = tree_leaves(x)
    with random_numbers_kept(0, {t.device for t in xs}), torch.no_grad():
        here = f(x)
    for h in (1e-2, 1e-4):  # a step function may change by the longer step
        steps = tree_map(lambda t, h=h: t.detach() + h * normal(t) * t.detach().abs().clamp(min=1), x)
        with random_numbers_kept(0, {t.device for t in xs}), torch.no_grad():
            there = f(steps)
        if here.shape != there.shape or bool(((here == there) | here.isnan()).all()):
            return
    raise RuntimeError(
        "f: its value changes with x, but no differentiable operations lead from x to it; .item(), .detach(), .data, "
        "torch.tensor(...), NumPy and no_grad take a value out of the graph: compute with the tensor itself"
    )


def guarded(derive: Function, f: Function, x: Any) -> Any:
    """derive(f, x), a first derivative, that raises if it is differentiated while f has no right second one.

    It raises, too, if f only seems to be constant.
    """
    level = maybe_current_level() or 0
    again = not level and any(t.requires_grad for t in tree_leaves(x))
    reasons: list[str] = []
    edges: list[Tensor] = []
    loose: list[bool] = []

    def seen(*args: Any) -> Any:
        y = f(*args)
        if isinstance(y, Tensor):
            loose.append(not y.requires_grad)
            if (reason := once(y)) or again or (not level and foreign(y)):
                reasons.append(reason)
                edges.extend(_outside(y, args, level))
        return y

    checked = False

    def check() -> None:
        nonlocal checked
        if reason := next(filter(None, reasons), ""):
            raise RuntimeError(f"f: {reason}{ADVICE}")
        if not checked:
            need_second(f, tree_map(Tensor.detach, x))
            checked = not _are_functorch_transforms_active()

    result = derive(seen, x)
    if not level and loose and all(loose):
        constant(f, x)
    return tree_map(lambda r: _Guard.apply(check, r, *edges), result) if edges else result


def _outside(y: Tensor, args: Any, level: int) -> list[Tensor]:
    """What leads from y to all that it depends on outside of a derivative by args, which began at this level of torch.func."""
    if not is_functorch_wrapped_tensor(y):
        inside = {id(t) for t in tree_leaves(args)}
        return [t for t in leaves(y) if id(t) not in inside]
    while maybe_get_level(y) > level:
        y = get_unwrapped(y)
    return [y]


class _Guard(torch.autograd.Function):
    """A result as it is, with edges to what it depends on: backward checks before it goes on, even where r has no graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(check: Callable[[], None], r: Tensor, *edges: Tensor) -> Tensor:
        return r.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.check, ctx.edges = inputs[0], len(inputs) - 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ctx.check()
        return None, grad, *[None] * ctx.edges

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *tangents: Any) -> Tensor:
        ctx.check()
        return tangent.clone()


def variable(t: Tensor) -> Tensor:
    """t, detached, to be differentiated by; tensors made in inference mode must be copied for that."""
    return (t.clone() if t.is_inference() else t.detach()).requires_grad_()


def normal(x: Tensor) -> Tensor:
    """Normal random numbers like x, always the same."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)


def exact(product: HessianProduct, v: Tensor, *, mend: bool = False) -> Tensor:
    """Hv, or an error where it would be by differences; to mend is to take these where torch is wrong, with a warning."""
    w = product(v)
    if mend and product.mistaken:
        warnings.warn(f"f: differences of gradients are taken: {product.reason}", stacklevel=4)
        return w
    if product.reason and product.method == "exact":
        if not product.foreign:
            return w
        remedy = "x nearer to 0, or scale f down" if "overflow" in product.reason else "float32 or float64"
        raise RuntimeError(f"f: its second derivative is {product.reason}; pass {remedy}")
    if product.reason:
        raise RuntimeError(f"f: {product.reason}{ADVICE}")
    return w
