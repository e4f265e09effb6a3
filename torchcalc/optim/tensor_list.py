"""The algebra in which update rules are written: the same body runs on one tensor or on a list of tensors.

:class:`TensorList` has the few methods of Tensor that rules use, each one ``torch._foreach_*`` call over the whole
list. The functions below are the multiply-adds of a rule. Their scalar is a number; or a *live* scalar: a tensor that
must stay one, because a derivative flows through it (``differentiable=True``), because reading it would make the host
wait for the device (``capturable=True``) or because its value must not be baked into a compiled graph. Or a
TensorList: one per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchcalc.formula.expression import maximum

__all__ = [
    "Recorded",
    "Scalar",
    "TensorList",
    "Vector",
    "add_product_",
    "add_ratio_",
    "add_scaled",
    "add_scaled_",
    "as_kind_of",
    "as_real",
    "at_least",
    "average_",
    "choose",
]


class TensorList:
    """A list of tensors with one device and dtype, and Tensor's own names for what rules do to it.

    Args:
        tensors: at least one, of any shapes.

    >>> p = TensorList([torch.zeros(2), torch.ones(1)])
    >>> p.add_(TensorList([torch.ones(2), torch.ones(1)]), alpha=0.5).tensors
    [tensor([0.5000, 0.5000]), tensor([1.5000])]
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    # In-place methods return self, like Tensor's.
    def add_(self, other: Any, alpha: float = 1) -> TensorList:
        if isinstance(other, TensorList):
            torch._foreach_add_(self.tensors, other.tensors, alpha=alpha)
        else:
            torch._foreach_add_(self.tensors, other)
        return self

    def mul_(self, other: Any) -> TensorList:
        torch._foreach_mul_(self.tensors, _plain(other))
        return self

    def div_(self, other: Any) -> TensorList:
        torch._foreach_div_(self.tensors, _plain(other))
        return self

    def sqrt_(self) -> TensorList:
        torch._foreach_sqrt_(self.tensors)
        return self

    def sign_(self) -> TensorList:
        torch._foreach_sign_(self.tensors)
        return self

    def copy_(self, other: TensorList) -> TensorList:
        torch._foreach_copy_(self.tensors, other.tensors)
        return self

    def clamp_min_(self, other: Any) -> TensorList:
        torch._foreach_clamp_min_(self.tensors, _plain(other))
        return self

    def clamp_(self, min: float, max: float) -> TensorList:
        torch._foreach_clamp_min_(self.tensors, min)
        torch._foreach_clamp_max_(self.tensors, max)
        return self

    def reciprocal_(self) -> TensorList:
        torch._foreach_reciprocal_(self.tensors)
        return self

    def lerp_(self, end: TensorList, weight: Any) -> TensorList:
        if isinstance(weight, Tensor):
            weight = [weight] * len(self.tensors)
        torch._foreach_lerp_(self.tensors, end.tensors, weight)
        return self

    def addcmul_(self, a: TensorList, b: Any, value: float = 1) -> TensorList:
        factors = b.tensors if isinstance(b, TensorList) else [b] * len(self.tensors)
        torch._foreach_addcmul_(self.tensors, a.tensors, factors, value=value)
        return self

    def addcdiv_(self, a: TensorList, b: TensorList, value: float = 1) -> TensorList:
        torch._foreach_addcdiv_(self.tensors, a.tensors, b.tensors, value=value)
        return self

    # Methods that make a new list.
    def clone(self) -> TensorList:
        return TensorList([t.clone() for t in self.tensors])

    def add(self, other: Any, alpha: float = 1) -> TensorList:
        if not isinstance(other, TensorList):
            return self + other
        return TensorList(torch._foreach_add(self.tensors, other.tensors, alpha=alpha))

    def sub(self, other: TensorList) -> TensorList:
        return TensorList(torch._foreach_sub(self.tensors, other.tensors))

    def abs(self) -> TensorList:
        return TensorList(torch._foreach_abs(self.tensors))

    def sign(self) -> TensorList:
        return TensorList(torch._foreach_sign(self.tensors))

    def addcmul(self, a: TensorList, b: Any, value: float = 1) -> TensorList:
        return self.clone().addcmul_(a, b, value)

    def mul(self, other: Any) -> TensorList:
        return TensorList(torch._foreach_mul(self.tensors, _plain(other)))

    def div(self, other: Any) -> TensorList:
        return TensorList(torch._foreach_div(self.tensors, _plain(other)))

    def sqrt(self) -> TensorList:
        return TensorList(torch._foreach_sqrt(self.tensors))

    def __neg__(self) -> TensorList:
        return TensorList(torch._foreach_neg(self.tensors))

    # Selections: torch has none for lists.
    def gt(self, other: float) -> TensorList:
        return TensorList([t > other for t in self.tensors])

    def ge(self, other: float) -> TensorList:
        return TensorList([t >= other for t in self.tensors])

    def lt(self, other: float) -> TensorList:
        return TensorList([t < other for t in self.tensors])

    def eq(self, other: float) -> TensorList:
        return TensorList([t == other for t in self.tensors])

    def where(self, condition: Any, other: TensorList) -> TensorList:
        conditions = condition.tensors if isinstance(condition, TensorList) else [condition] * len(self.tensors)
        return TensorList(
            [torch.where(c, a, b) for c, a, b in zip(conditions, self.tensors, other.tensors, strict=True)]
        )

    def masked_fill(self, mask: TensorList, value: float) -> TensorList:
        return TensorList([t.masked_fill(m, value) for t, m in zip(self.tensors, mask.tensors, strict=True)])

    __gt__, __ge__ = gt, ge

    # Arithmetic with scalars, for lists of live step counts: 1 - β ** t, lr / (...).
    __mul__ = __rmul__ = mul
    __truediv__ = div

    def __add__(self, other: float) -> TensorList:
        return TensorList(torch._foreach_add(self.tensors, other))

    __radd__ = __add__

    def __sub__(self, other: float) -> TensorList:
        return self + -other

    def __rsub__(self, other: float) -> TensorList:
        return -self + other

    def __rtruediv__(self, other: Any) -> TensorList:
        return TensorList(torch._foreach_reciprocal(self.tensors)).mul_(other)

    def __pow__(self, exponent: float) -> TensorList:
        return TensorList(torch._foreach_pow(self.tensors, exponent))

    def __rpow__(self, base: Any) -> TensorList:
        if isinstance(base, Tensor):
            return TensorList([base**t for t in self.tensors])
        return TensorList(torch._foreach_pow(base, self.tensors))


class Recorded:
    """A tensor for a rule that autograd records: its in-place methods make a new tensor and hold that one instead.

    The values are those of Tensor's methods, and the old ones stay, which a derivative may need: that of √v needs √v,
    and a rule goes on to write to it.

    >>> v = torch.tensor(4.0, requires_grad=True)
    >>> Recorded(v).sqrt().add_(1.0).tensor.backward()
    >>> v.grad
    tensor(0.2500)
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def copy_(self, other: Recorded) -> Recorded:
        self.tensor = other.tensor
        return self

    def __neg__(self) -> Recorded:
        return Recorded(-self.tensor)

    def __getattr__(self, name: str) -> Callable[..., Recorded]:
        function = getattr(self.tensor, name.removesuffix("_"))

        def method(*args: Any, **kwargs: Any) -> Recorded:
            new = function(*(a.tensor if isinstance(a, Recorded) else a for a in args), **kwargs)
            if not name.endswith("_"):
                return Recorded(new)
            self.tensor = new.to(self.dtype)
            return self

        return method


Vector = Any  # Tensor | TensorList | Recorded | formula.rule.Cell, the things rules run on
Scalar = Any  # float | Tensor | TensorList | formula.Expression


def _plain(x: Any) -> Any:
    return x.tensors if isinstance(x, TensorList) else x


def as_real(*vectors: Any) -> tuple[Any, ...]:
    """Views of complex tensors as real ones, of one more dimension; None and real tensors as they are."""

    def view(x: Any) -> Any:
        if isinstance(x, Recorded):
            if x.dtype.is_complex:
                x.tensor = torch.view_as_real(x.tensor)  # the driver turns it back
            return x
        if isinstance(x, TensorList):
            return TensorList([torch.view_as_real(t) for t in x.tensors]) if x.tensors[0].is_complex() else x
        return torch.view_as_real(x) if x is not None and x.is_complex() else x

    return tuple(map(view, vectors))


def as_kind_of(p: Vector, x: Vector) -> Vector:
    """A real view x as a complex vector again, if p is one."""
    if isinstance(p, TensorList):
        return TensorList([torch.view_as_complex(t) for t in x.tensors]) if p.dtype.is_complex else x
    if isinstance(p, Recorded):
        return Recorded(torch.view_as_complex(x.tensor)) if p.dtype.is_complex else x
    return torch.view_as_complex(x) if p.is_complex() else x


def is_live(a: Scalar) -> bool:
    """Whether a scalar must stay a tensor."""
    if isinstance(a, Tensor):
        return a.requires_grad or not a.is_cpu or torch.compiler.is_compiling()
    return isinstance(a, TensorList)


def add_scaled(y: Vector, x: Vector, a: Scalar) -> Vector:
    """y + a·x, as a new tensor."""
    return y.add(x.mul(a)) if is_live(a) else y.add(x, alpha=a)


def add_scaled_(y: Vector, x: Vector, a: Scalar) -> Vector:
    """y ← y + a·x."""
    return y.add_(x.mul(a)) if is_live(a) else y.add_(x, alpha=a)


def average_(y: Vector, x: Vector, beta: Scalar) -> Vector:
    """y ← y + (1 − β)·(x − y), the exponential moving average."""
    if isinstance(beta, Tensor):  # torch wants it on y's device and of y's dtype
        beta = beta.to(y.device, y.dtype)
    return y.lerp_(x, 1 - beta)


def add_product_(y: Vector, x: Vector, z: Vector, a: Scalar) -> Vector:
    """y ← y + a·x·z."""
    return y.addcmul_(x.mul(a), z) if is_live(a) else y.addcmul_(x, z, value=a)


def add_ratio_(y: Vector, x: Vector, z: Vector, a: Scalar) -> Vector:
    """y ← y + a·x/z."""
    return y.addcdiv_(x, z.div(a)) if is_live(a) else y.addcdiv_(x, z, value=a)


def at_least(x: Scalar, low: float) -> Scalar:
    """max(x, low), of a scalar."""
    return x.clone().clamp_min_(low) if isinstance(x, TensorList) else maximum(x, low)


def choose(condition: Scalar, a: Vector, b: Vector) -> Vector:
    """a if the condition holds, else b: for a rule that changes with t, which an ``if`` could not ask on a device."""
    if isinstance(condition, bool):
        return a if condition else b
    return a.where(condition.to(a.device) if isinstance(condition, Tensor) else condition, b)
