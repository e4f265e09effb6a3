"""Derivatives of any callable, in the words of a textbook; each takes a function and returns a function.

    derivative              f'(x) = lim (f(x + h) − f(x))/h for h → 0             (1)
    partial                 ∂f/∂xᵢ: (1) in the variable xᵢ, the others held       (2)
    jacobian                Jₖᵢ = ∂fₖ/∂xᵢ, so that f(x + d) = f(x) + Jd + o(‖d‖)   (3)
    gradient                ∇f = Jᵀ for scalar f: the direction of steepest ascent (4)
    directional_derivative  d/dr f(x + r·v) at r = 0, which by (3) is Jv          (5)
    hessian                 Hᵢⱼ = ∂²f/∂xᵢ∂xⱼ, the Jacobian of the gradient        (6)
    hvp                     Hv = ∇(∇fᵀv)                                          (7)

None of these is a difference quotient. The chain rule, D(f∘g) = Df(g)·Dg, reduces f to its operations, whose
derivatives are known, and the product of their Jacobians is taken from the left (reverse mode: one row uᵀJ costs about
two evaluations of f, whatever the size of x) or from the right (forward mode: one column Jv). Rows are the default:
where an operation has no derivative they raise, but forward mode then takes some for constants (``torch.library.custom_op``).
So a Jv by forward mode is checked by a row: for any u,

    uᵀ(Jv) = (uᵀJ)v.                                                              (8)

The functions compose with each other and with ``torch.func``, on which they are built. Where that refuses an operation
(an ``autograd.Function`` without ``setup_context``, a Python ``if`` under vmap) they use plain autograd, row by row.

A second derivative is right or raises where a Function is marked with ``once_differentiable``, however the functions
are nested: the result of the inner one has an edge to what f depends on, along which backward raises. A backward that
works on detached tensors bears no mark. It is found by comparison with differences (``hessian_product.py``), which is
possible everywhere but inside a transform of torch.func: ``hessian(f)`` and ``jacobian(gradient(f))`` notice it,
``vmap(hessian(f))`` and ``jacobian(lambda x: gradient(f)(x))`` only if that Function has no ``setup_context``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.func import jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from torchcalc.calculus.checks import (
    exact,
    guarded,
    mark,
    need_second,
    need_second_if_nested,
    normal,
    scalar,
    tensor,
    variable,
)
from torchcalc.calculus.hessian_product import HessianProduct
from torchcalc.calculus.operations import nodes
from torchcalc.calculus.variables import like, named, real

__all__ = ["derivative", "directional_derivative", "gradient", "hessian", "hvp", "jacobian", "partial"]

Function = Callable[..., Any]


def derivative(f: Function) -> Function:
    """The derivative (1) of a function of one real variable.

    Args:
        f: takes a 0-d tensor and returns a tensor: 0-d, or of any shape (a curve).

    Returns:
        A function of x, a real float tensor or a number, that applies f' at every element of x by itself: of the shape
        of x, followed by that of what f returns.

    Raises (when called):
        TypeError: x is not real and float, or f returns no tensor.
        RuntimeError: an operation in f has no derivative.

    >>> derivative(lambda x: x**2)(3.0)
    tensor(6.)
    >>> derivative(derivative(torch.sin))(torch.tensor([0.0, torch.pi / 2]))  # −sin
    tensor([-0., -1.])
    """

    def f_prime(x: Tensor | float) -> Tensor:
        x = real(x)
        if not isinstance(x, Tensor):
            raise TypeError(f"x: a {type(x).__name__}; pass a float tensor or a number, or use gradient or partial")
        if not x.numel():
            return torch.zeros_like(x)
        ts = x.reshape(-1)
        each = lambda g, ts: torch.stack([g(t) for t in ts.unbind()])  # noqa: E731
        try:
            need_second_if_nested(f, ts, lambda g, ts: vmap(g)(ts))
            slopes = guarded(lambda f, ts: vmap(jacrev(tensor(f)))(ts), f, ts)
        except RuntimeError as error:
            _reraise(error)
            need_second_if_nested(f, ts, each)
            slopes = each(lambda t: _jacobian(f, t), ts)
        return slopes.reshape(x.shape + slopes.shape[1:])

    return mark(f_prime, f)


def partial(f: Function, i: int) -> Function:
    """The partial derivative (2) of a function of several variables, by argument i, counted from 0.

    Args:
        f: takes tensors, or dicts of tensors, and returns a tensor.
        i: which argument; a negative one counts from the end.

    Returns:
        A function of the same arguments (numbers become tensors). For real variables and values it is the partial
        derivative; in general the Jacobian by argument i, of the shape of what f returns, followed by that of the argument.

    Raises (when called):
        IndexError: there is no argument i. TypeError, RuntimeError: as :func:`derivative`.

    >>> partial(lambda x, y: x * y**2, 1)(2.0, 3.0)  # 2xy
    tensor(12.)
    """

    if not isinstance(i, int):
        raise TypeError(f"i: {i!r}; it must be the number of an argument, an int")

    def f_i(*args: Any) -> Any:
        if not -len(args) <= i < len(args):
            raise IndexError(f"i: {i}; f was called with {len(args)} arguments, counted from 0")
        k = i % len(args)
        xs = [torch.tensor(float(a)) if isinstance(a, (int, float)) else a for a in args]
        xs[k] = real(xs[k], f"argument {i}")
        variables = {str(j): x for j, x in enumerate(xs) if j == k or (isinstance(x, Tensor) and x.is_floating_point())}
        need_second_if_nested(f, variables, lambda g, at: g(*[at.get(str(j), x) for j, x in enumerate(xs)]))
        return _jacobian(lambda x: f(*xs[:k], x, *xs[k + 1 :]), xs[k])

    return mark(f_i, f)


def gradient(f: Function) -> Function:
    """The gradient (4) of a scalar function.

    Args:
        f: takes a tensor, or a dict of tensors, and returns a scalar tensor, such as a training loss.

    Returns:
        A function of x that returns the gradient in the structure of x.

    Raises (when called):
        ValueError: f returns more than one element. TypeError, RuntimeError: as :func:`derivative`.

    >>> gradient(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0]))
    tensor([2., 4.])
    >>> gradient(lambda p: p["w"] * 3.0 + p["b"])({"w": torch.tensor(1.0), "b": torch.tensor(0.0)})
    {'w': tensor(3.), 'b': tensor(1.)}
    """

    def grad_f(x: Any) -> Any:
        x = real(x)
        need_second_if_nested(f, x)
        return guarded(by_reverse, f, x)

    def by_reverse(f: Function, x: Any) -> Any:
        try:
            return torch.func.grad(scalar(f))(x)
        except RuntimeError as error:
            _reraise(error)
            return _plain_jacobian(scalar(f), x)

    return mark(grad_f, f)


def jacobian(f: Function) -> Function:
    """The Jacobian matrix (3).

    Args:
        f: takes a tensor, or a dict of tensors, and returns a tensor.

    Returns:
        A function of x that returns ∂f/∂x, of the shape of what f returns, followed by that of x; a dict of those for a
        dict.

    Raises (when called): as :func:`derivative`.

    >>> jacobian(lambda x: torch.stack([x[0] * x[1], x[0] + x[1]]))(torch.tensor([2.0, 3.0]))
    tensor([[3., 2.],
            [1., 1.]])
    """

    def J(x: Any) -> Any:
        x = real(x)
        need_second_if_nested(f, x)
        return _jacobian(f, x)

    return mark(J, f)


def directional_derivative(f: Function, v: Any) -> Function:
    """The derivative along a direction (5): the rate of f when x moves with velocity v.

    Args:
        f: takes a tensor, or a dict of tensors, and returns a tensor.
        v: like x, not normalised: twice the v, twice the derivative.

    Returns:
        A function of x, of the shape of what f returns.

    Raises (when called): as :func:`derivative`; ValueError: v is not like x.

    >>> directional_derivative(lambda x: x[0] * x[1], torch.tensor([1.0, 0.0]))(torch.tensor([2.0, 3.0]))
    tensor(3.)
    """

    def along(x: Any) -> Tensor:
        x = real(x)
        d = like(v, x)
        need_second_if_nested(f, x)
        g = tensor(f)
        try:
            out: Tensor = jvp(g, (x,), (d,))[1]
            if _are_functorch_transforms_active() or _adjoint(g, x, d, out):
                return out
        except RuntimeError as error:
            _reraise(error)
        J = tree_leaves(_jacobian(f, x))
        return _sum(torch.tensordot(Ji, di, dims=di.dim()) for Ji, di in zip(J, tree_leaves(d), strict=True))

    return mark(along, f)


def hessian(f: Function) -> Function:
    """The Hessian matrix (6) of a scalar function: n² elements; :func:`hvp` and ``curvature`` do without it.

    Args:
        f: takes a tensor, or a dict of tensors, and returns a scalar tensor.

    Returns:
        A function of x: of the shape of x twice; for a dict a dict of dicts.

    Raises (when called): as :func:`gradient`; RuntimeError also where the second derivative of an operation is
    missing and torch would give zeros without a word (``once_differentiable``).

    >>> hessian(lambda x: x[0] ** 2 * x[1])(torch.tensor([2.0, 3.0]))
    tensor([[6., 4.],
            [4., 0.]])
    """

    def H(x: Any) -> Any:
        x = real(x)
        need_second(f, x)
        try:
            return jacrev(gradient(f))(x)
        except RuntimeError as error:
            _reraise(error)
        product = HessianProduct(scalar(f), x)
        rows = [exact(product, e) for e in torch.eye(product.size, dtype=product.dtype, device=product.device)]
        square, sizes = torch.stack(rows), [t.numel() for t in tree_leaves(x)]
        xs = named(x, "x")
        blocks = {
            i: {
                j: block.reshape(xs[i].shape + xs[j].shape).to(xs[j])
                for j, block in zip(xs, band.split(sizes, dim=1), strict=True)
            }
            for i, band in zip(xs, square.split(sizes), strict=True)
        }
        return blocks[""][""] if isinstance(x, Tensor) else blocks

    return mark(H, f)


def hvp(f: Function, v: Any) -> Function:
    """The Hessian times a vector (7), without the Hessian, for the price of about two gradients.

    Args:
        f: takes a tensor, or a dict of tensors, and returns a scalar tensor.
        v: like x.

    Returns:
        A function of x that returns Hv in the structure of x.

    Raises (when called): as :func:`hessian`; ValueError: v is not like x.

    >>> hvp(lambda x: x[0] ** 2 * x[1], torch.tensor([1.0, 0.0]))(torch.tensor([2.0, 3.0]))
    tensor([6., 4.])
    """

    def Hv(x: Any) -> Any:
        x = real(x)
        d = like(v, x)
        need_second(f, x)

        def slope(x: Any) -> Tensor:
            g = gradient(f)(x)
            return _sum((gi * di).sum() for gi, di in zip(tree_leaves(g), tree_leaves(d), strict=True))

        try:
            return torch.func.grad(slope)(x)
        except RuntimeError as error:
            _reraise(error)
        product = HessianProduct(scalar(f), x)
        return product.like(exact(product, product.flat(d, "v")))

    return mark(Hv, f)


def _sum(terms: Any) -> Tensor:
    first, *others = terms
    return sum(others, start=first)


def _jacobian(f: Function, x: Any) -> Any:
    return guarded(_rows, f, x)


def _rows(f: Function, x: Any) -> Any:
    try:
        return jacrev(tensor(f))(x)
    except RuntimeError as error:
        _reraise(error)
        return _plain_jacobian(tensor(f), x)


def _plain_jacobian(f: Function, x: Any) -> Any:
    """Row by row with plain autograd; differentiable again by all that requires grad."""
    leaves, structure = tree_flatten(x)
    with torch.inference_mode(False), torch.enable_grad():
        xs = [t.view_as(t) if t.requires_grad else variable(t) for t in leaves]
        y = f(tree_unflatten(xs, structure))
        own = {id(t) for t in xs}
        again = any(hasattr(node, "variable") and id(node.variable) not in own for node in nodes(y))
        rows = [_row(component, xs, again) for component in y.reshape(-1)]
    columns = [
        torch.stack([row[i] for row in rows]).reshape(y.shape + t.shape) if rows else t.new_zeros(y.shape + t.shape)
        for i, t in enumerate(xs)
    ]
    return tree_unflatten(columns, structure)


def _row(y: Tensor, xs: list[Tensor], again: bool) -> list[Tensor]:
    if not y.requires_grad:  # a constant
        return [torch.zeros_like(x) for x in xs]
    found = torch.autograd.grad(y, xs, retain_graph=True, create_graph=again, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.to_dense() for g, x in zip(found, xs, strict=True)]


def _adjoint(f: Function, x: Any, v: Any, out: Tensor) -> bool:
    """Whether (8) holds for out = Jv and one u."""
    y, pull = vjp(f, x)[:2]
    u = normal(y)
    (row,) = pull(u)
    left = (u * out).double()
    right = torch.cat([(r * d).double().reshape(-1) for r, d in zip(tree_leaves(row), tree_leaves(v), strict=True)])
    size = left.abs().sum() + right.abs().sum()
    return bool((left.sum() - right.sum()).abs() <= torch.finfo(y.dtype).eps ** 0.5 * size)


def _reraise(error: RuntimeError) -> None:
    """Inside another transform, and out of memory, there is nothing else to try."""
    if _are_functorch_transforms_active() or isinstance(error, torch.OutOfMemoryError):
        raise error
