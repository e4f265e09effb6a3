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
where an operation has no derivative they raise, but forward mode then takes some for constants (``torch.library.custom_op``),
and what it gives cannot always be differentiated again (of ``torch.linalg.det`` it is wrong). So a column is taken only
of an f with several values, and checked by a row: for any u,

    uᵀ(Jv) = (uᵀJ)v.                                                              (8)

The functions compose with each other and with ``torch.func``. f is called as it is, with tensors that require grad,
and differentiated by plain autograd; inside a transform of ``torch.func``, and for :func:`derivative` of many elements,
by ``torch.func``, which may draw other random numbers (a dropout mask of a tensor that is not contiguous).

A second derivative is right or raises, however the functions are nested: each is compared with differences
(``hessian_product.py``), and the result of an inner one has an edge to what f depends on, along which backward raises.
No comparison is possible inside a transform of torch.func: there only the mark of ``once_differentiable`` is seen, and a
Function that has no ``setup_context`` is refused.

Reference: Griewank and Walther 2008, "Evaluating derivatives", doi:10.1137/1.9780898717761.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.func import jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from torchcalc.calculus.checks import (
    constant,
    exact,
    guarded,
    mark,
    need_second_if_nested,
    normal,
    scalar,
    tensor,
    variable,
)
from torchcalc.calculus.hessian_product import HessianProduct, Unconnected, attention_with_second_derivative
from torchcalc.calculus.operations import leaves
from torchcalc.calculus.variables import like, real

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
        RuntimeError: an operation in f has no derivative, or f computes its value outside of the graph (``x.item()``).

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
        together = lambda g, ts: vmap(g)(ts)  # noqa: E731
        try:
            need_second_if_nested(f, ts, together)
            slopes = _slopes(tensor(f), ts)
            known = _are_functorch_transforms_active() or bool(slopes.isfinite().all())
        except RuntimeError as error:
            _reraise(error)
            need_second_if_nested(f, ts, each)
            known = False
        if not known:  # vmap takes another way through some operations, such as det, which may be a worse one
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
        return guarded(lambda f, x: _rows(scalar(f), x), f, real(x))

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
        return _jacobian(f, real(x))

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
        result: Tensor = guarded(lambda f, x: _along(tensor(f), x, d), f, x)
        return result

    return mark(along, f)


def hessian(f: Function) -> Function:
    """The Hessian matrix (6) of a scalar function: n² elements; :func:`hvp` and ``curvature`` do without it.

    Args:
        f: takes a tensor, or a dict of tensors, and returns a scalar tensor.

    Returns:
        A function of x: of the shape of x twice; for a dict a dict of dicts.

    Raises (when called): as :func:`gradient`; RuntimeError also where the second derivative of an operation is
    missing, and torch would give zeros without a word (``once_differentiable``). Where torch's own is wrong, differences of
    gradients are taken, with a warning, or an error if the result is to be differentiated.

    >>> hessian(lambda x: x[0] ** 2 * x[1])(torch.tensor([2.0, 3.0]))
    tensor([[6., 4.],
            [4., 0.]])
    """

    def H(x: Any) -> Any:
        x = real(x)
        if _are_functorch_transforms_active():
            return jacrev(gradient(f))(x)
        product, _, again = _second(f, x, None)
        if not product.mistaken:
            with attention_with_second_derivative():
                found = _plain(lambda x: _plain(scalar(f), x), x)
            if again or all(bool(t.isfinite().all()) for t in tree_leaves(found)):
                return found
        return _assembled(product, x)

    return mark(H, f)


def hvp(f: Function, v: Any) -> Function:
    """The Hessian times a vector (7), without the Hessian, for the price of about two gradients, and two that check it.

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
        if _are_functorch_transforms_active():
            return torch.func.grad(lambda x: _dot(gradient(f)(x), d))(x)
        product, w, again = _second(f, x, d)
        if not again:
            return product.like(w)
        with attention_with_second_derivative():
            return _plain(lambda x: _dot(_plain(scalar(f), x), d), x)

    return mark(Hv, f)


def _dot(x: Any, y: Any) -> Tensor:
    first, *others = [(a * b).sum() for a, b in zip(tree_leaves(x), tree_leaves(y), strict=True)]
    return sum(others, start=first)


def _second(f: Function, x: Any, v: Any) -> tuple[HessianProduct, Tensor, bool]:
    """The Hessian, its product with v or with random numbers, checked, and whether that must be differentiable again."""
    product = HessianProduct(scalar(f), x)
    u = normal(torch.zeros(product.size, dtype=product.dtype, device=product.device))
    again = torch.is_grad_enabled() and any(t.requires_grad for t in tree_leaves(x))
    try:
        w = exact(product, u if v is None else product.flat(v, "v"), mend=not again)
    except Unconnected:
        constant(f, x)
        w = torch.zeros_like(u)
    return product, w, again or (torch.is_grad_enabled() and product.outside and not product.mistaken)


def _assembled(product: HessianProduct, x: Any) -> Any:
    """The Hessian from its products with the columns of the identity, in the structure of x twice."""
    square = torch.stack([product(e) for e in torch.eye(product.size, dtype=product.dtype, device=product.device)])
    xs, structure = tree_flatten(x)
    sizes = [t.numel() for t in xs]
    blocks = [
        [block.reshape(a.shape + b.shape).to(a) for b, block in zip(xs, band.split(sizes, dim=1), strict=True)]
        for a, band in zip(xs, square.split(sizes), strict=True)
    ]
    return tree_unflatten([tree_unflatten(row, structure) for row in blocks], structure)


def _slopes(f: Function, ts: Tensor) -> Tensor:
    """The derivative at each of the numbers; together they are a function whose Jacobian is a diagonal."""
    if _are_functorch_transforms_active():
        return vmap(lambda t: guarded(lambda f, t: jacrev(f)(t), f, t))(ts)

    def diagonal(f: Function, ts: Tensor) -> Tensor:
        sums = _plain(lambda ts: f(ts).sum(0), ts)
        return sums.movedim(-1, 0)

    result: Tensor = guarded(diagonal, vmap(f), ts)
    return result


def _jacobian(f: Function, x: Any) -> Any:
    return guarded(lambda f, x: _rows(tensor(f), x), f, x)


def _rows(f: Function, x: Any) -> Any:
    return jacrev(f)(x) if _are_functorch_transforms_active() else _plain(f, x)


def _along(f: Function, x: Any, v: Any) -> Tensor:
    """Jv: of one value from the row J, of several from forward mode, if (8) holds and it need not be differentiated again."""
    if _are_functorch_transforms_active():
        y, pull = vjp(f, x)[:2]
        return _dot(pull(torch.ones_like(y))[0], v).reshape(y.shape) if y.numel() == 1 else jvp(f, (x,), (v,))[1]
    ds = tree_leaves(v)
    with _recorded(f, x) as (y, xs, again):
        if y.numel() != 1 and y.requires_grad and not again:
            u = normal(y)
            row = _dot(_row(y, xs, u), ds)
            try:
                out: Tensor = jvp(f, (x,), (v,))[1]
                if _close((u * out).sum(), row):
                    return out
            except RuntimeError as error:
                _reraise(error)
        first, *others = [torch.tensordot(J, d, d.dim()) for J, d in zip(_matrices(y, xs, again), ds, strict=True)]
        return sum(others, start=first)


def _plain(f: Function, x: Any) -> Any:
    """The Jacobian, of each tensor that f returns, by plain autograd; differentiable again by all that requires grad."""
    structure = tree_flatten(x)[1]
    with _recorded(f, x) as (y, xs, again):
        return tree_map(lambda y: tree_unflatten(_matrices(y, xs, again), structure), y)


@contextmanager
def _recorded(f: Function, x: Any) -> Iterator[tuple[Any, list[Tensor], bool]]:
    """f(x), the variables in its graph that stand for x, and whether its derivative is to have a graph as well."""
    differentiable = torch.is_grad_enabled()
    tensors, structure = tree_flatten(x)
    with torch.inference_mode(False), torch.enable_grad():
        xs = [t.view_as(t) if t.requires_grad else variable(t) for t in tensors]
        with warnings.catch_warnings():  # math.sin(x) and x.item() are told of by errors
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")
            y = f(tree_unflatten(xs, structure))
        own = {id(t) for t in xs}
        yield y, xs, differentiable and any(id(t) not in own for each in tree_leaves(y) for t in leaves(each))


def _matrices(y: Tensor, xs: list[Tensor], again: bool) -> list[Tensor]:
    """∂y/∂x of each x: all rows at once, if they agree with a sum of them; else row by row."""
    flat = y.reshape(-1)
    if not y.requires_grad or not y.numel():  # a constant
        return [x.new_zeros(y.shape + x.shape) for x in xs]
    if y.numel() > 1 and not again:  # rows made at once can be worse to differentiate, as those of det
        u = normal(flat)
        row = _row(flat, xs, u)
        try:
            every = torch.eye(len(flat), dtype=y.dtype, device=y.device)
            found = _row(flat, xs, every, is_grads_batched=True)
            if all(_close(torch.tensordot(u, J, 1), g) for J, g in zip(found, row, strict=True)):
                return [J.reshape(y.shape + x.shape) for J, x in zip(found, xs, strict=True)]
        except RuntimeError as error:
            _reraise(error)
    rows = [_row(component, xs, torch.ones_like(component), again) for component in flat]
    return [torch.stack(rs).reshape(y.shape + x.shape) for rs, x in zip(zip(*rows, strict=True), xs, strict=True)]


def _row(y: Tensor, xs: list[Tensor], u: Tensor, again: bool = False, **batched: bool) -> list[Tensor]:
    """uᵀ·∂y/∂x of each x."""
    found = torch.autograd.grad(y, xs, u, retain_graph=True, create_graph=again, allow_unused=True, **batched)
    more = u.shape[: u.dim() - y.dim()]
    return [x.new_zeros(more + x.shape) if g is None else g.to_dense() for g, x in zip(found, xs, strict=True)]


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two ways to the same tensor agree, up to rounding."""
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return torch.allclose(
        a.detach(), b.detach(), tolerance, tolerance * float(b.detach().abs().nan_to_num(0).amax()), equal_nan=True
    )


def _reraise(error: RuntimeError) -> None:
    """Inside another transform, and out of memory, there is nothing else to try."""
    if _are_functorch_transforms_active() or isinstance(error, torch.OutOfMemoryError):
        raise error
