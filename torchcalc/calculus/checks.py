"""What the derivatives ask of functions and variables, and of second derivatives, before they answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchcalc.calculus.hessian_product import HessianProduct, foreign

__all__ = [
    "exact",
    "like",
    "mark",
    "need_second",
    "need_second_if_nested",
    "normal",
    "real",
    "real_tree",
    "scalar",
    "tensor",
]

Function = Callable[..., Any]


def tensor(f: Function) -> Function:
    """f, which must return a tensor."""

    def g(*args: Any) -> Tensor:
        y = f(*args)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"f returned a {type(y).__name__}, which has no derivative; return a tensor, and use torch.sin, not math.sin"
            )
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


def real(*xs: Any) -> list[Tensor]:
    """Real float tensors; Python numbers become such."""
    found = []
    for x in xs:
        t = torch.tensor(float(x)) if isinstance(x, (int, float)) else x
        if not isinstance(t, Tensor):
            raise TypeError(f"x: a {type(t).__name__}; pass a float tensor, or a dict of them")
        if not t.is_floating_point():
            raise TypeError(f"x: {t.dtype} is no real variable; pass x.float() (or real and imaginary part)")
        found.append(t)
    return found


def real_tree(x: Any) -> Any:
    """The same of every leaf of a dict."""
    leaves, structure = tree_flatten(x)
    return tree_unflatten(real(*leaves), structure)


def like(v: Any, x: Any) -> None:
    """Raise unless v has the structure and the shapes of x."""
    (vs, structure), (xs, expected) = tree_flatten(v), tree_flatten(x)
    found = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in vs]
    if structure != expected or found != [tuple(t.shape) for t in xs]:
        raise ValueError(f"v: its shapes are {found}; those of x are {[tuple(t.shape) for t in xs]}")


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
    """Raise where an operation that is not torch's own has lost its second derivative."""
    if _are_functorch_transforms_active():
        return  # the outermost call has seen to it

    def weighted(x: Any) -> Tensor:
        y = tensor(f)(x)
        return (y * normal(y)).sum()

    leaves, structure = tree_flatten(x)
    with torch.enable_grad():
        y = weighted(tree_unflatten([t.detach().requires_grad_() for t in leaves], structure))
    if foreign(y):
        product = HessianProduct(weighted, x)
        exact(product, normal(torch.zeros(product.size, dtype=product.dtype, device=product.device)))


def normal(x: Tensor) -> Tensor:
    """Normal random numbers like x, always the same."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def exact(product: HessianProduct, v: Tensor) -> Tensor:
    """Hv, or an error where it would be by differences."""
    w = product(v)
    if product.method == "differences":
        raise RuntimeError(
            f"f: {product.reason}. Make its backward differentiable, or use torchcalc.calculus.curvature and "
            "curvature_along, which fall back to differences of gradients"
        )
    return w
