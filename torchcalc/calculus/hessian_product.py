"""The Hessian times a vector, without the Hessian.

Pearlmutter's trick.  With the gradient g = ∇f and a fixed vector v,

    Hv = ∂g/∂x · v = ∂/∂r g(x + r·v) at r = 0                                     (1)
       = ∇(gᵀv)              since H = Hᵀ                                         (2)

so one backward through the graph of the gradient gives Hv, for the price of about two gradients: O(n), where H has n²
entries. The graph of g does not depend on v: it is recorded once and walked for every v.

Where an operation has no second derivative, (1) is taken by central differences of gradients along u = v/‖v‖,

    (g(x + h·u) − g(x − h·u)) / 2h · ‖v‖ = Hv + ‖v‖·(h²/6 · g''' + e/h),          (3)

with g''' the third derivative of g along u, and e the rounding error of g, about ε·‖g‖. If g changes as a whole when x
moves by a length L, then ‖g'''‖ ≈ ‖g‖/L³, and the error of (3) is smallest where its derivative by h vanishes:
h/3L³ = ε/h², that is

    h = (3ε)^⅓·L.                                                                 (4)

L is taken as the distance along u at which the first element of x has moved by the root-mean-square of all elements,
but at least 0.01: L = max(rms(x), 0.01)/max|uᵢ|. That is a guess, and (4) is not for ReLU networks, where g jumps at
kinks: n of them between x ± h·u, each of random sign, add a noise of √n/h ~ 1/√h, and longer steps are better. So 100h,
10h and h are tried on the first vector, and the one is kept whose product changes least with the step. The result is
the curvature averaged over that distance.

No second derivative is often no error in torch: what ``once_differentiable`` guards, or a backward that works on
detached tensors or in NumPy, is taken for a constant, and its share of Hv is silently zero. torch's own operations are
right or raise, and so are torchcalc's. Where a graph contains others, and where Hv is zero because no path leads from g
back to x (as it must be for linear f), the first product is compared with (3), by h and shorter steps, which meet fewer
kinks or none, and believed if it agrees with one of them to a tenth.

Reference: Pearlmutter 1994, "Fast exact multiplication by the Hessian", doi:10.1162/neco.1994.6.1.147; Nocedal, Wright
2006, "Numerical optimization", section 8.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchcalc.calculus.training_loss import TrainingLoss

__all__ = ["HessianProduct", "foreign"]

Tensors = Tensor | Mapping[str, Tensor]

AGREEMENT = 0.1  # of a product with its difference quotient, within which the product is believed
SHORTER = (1.0, 0.1, 0.01, 0.001)  # steps of that comparison, in units of (4)
LONGER = (1000.0, 100.0, 10.0, 1.0, 0.1)  # steps that are tried on the first vector; one with two neighbours is kept


class HessianProduct:
    """v ↦ Hv of f at x, on flat vectors: float64 if an element of x is, else float32.

    Attributes:
        method: "exact", by (2), or "differences", by (3); decided by the first product.
        reason: why differences, in words.
        size: elements of x.
    """

    def __init__(self, f: Callable[[Any], Tensor], at: Tensors) -> None:
        self._parts: Sequence[Callable[[Any], Tensor]] = f.parts if isinstance(f, TrainingLoss) else [f]
        self._bare = isinstance(at, Tensor)
        self._at = {name: x.detach() for name, x in named(at, "at").items()}
        for name, x in self._at.items():
            if not x.is_floating_point():
                raise TypeError(f"at{f'[{name!r}]' if name else ''}: {x.dtype} is not a real float dtype; convert it")
        self.size = sum(x.numel() for x in self._at.values())
        if not self.size:
            raise ValueError("at: it has no elements; pass what f is to be differentiated by")
        self.device = next(iter(self._at.values())).device
        self.dtype = torch.float64 if any(x.dtype == torch.float64 for x in self._at.values()) else torch.float32
        self.method: Literal["exact", "differences"] = "exact"
        self.reason = ""
        self._decided = False
        self._step = 1.0
        self._graph: tuple[list[Tensor], list[Tensor], bool] | None = None

    def flat(self, tree: Tensors, name: str) -> Tensor:
        """A tensor or dict like x, as one vector."""
        tensors = named(tree, name)
        shapes = {k: tuple(x.shape) for k, x in self._at.items()}
        found = {k: tuple(t.shape) for k, t in tensors.items()}
        if isinstance(tree, Tensor) != self._bare or found != shapes:
            raise ValueError(f"{name}: its shapes are {found}; those of `at` are {shapes}")
        return self._join([tensors[k].detach() for k in self._at])

    def like(self, vector: Tensor) -> Any:
        """One vector, as a tensor or dict like x."""
        pieces = dict(zip(self._at, self._split(vector), strict=True))
        return pieces[""] if self._bare else pieces

    def __call__(self, v: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), _attention_with_second_derivative():
            if self.method == "differences":
                return self._differences(v, self._step)[0]
            try:
                product, unsure = self._exact(v)
                self.reason = "" if self._decided or not unsure else self._contradiction(v, product)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.reason = str(error).split("\n")[0]
            self._decided = True
            if not self.reason:
                return product
            self.method, self._graph = "differences", None
            return self._first_differences(v)  # if f itself is at fault, this raises its error

    def _exact(self, v: Tensor) -> tuple[Tensor, bool]:
        """Hv by (2), and whether it may lack something."""
        total, doubt, connected = torch.zeros_like(v), False, False
        ws = self._split(v)
        for part in self._parts:
            xs, gs, unsure = self._graph or self._record(part)
            live = [j for j, g in enumerate(gs) if g.requires_grad]
            keep = len(self._parts) == 1  # the graphs of many batches at once may not fit
            if keep:
                self._graph = xs, gs, unsure
            if live:
                outputs, vs = [gs[j] for j in live], [ws[j] for j in live]
                found = torch.autograd.grad(outputs, xs, vs, retain_graph=keep, allow_unused=True)  # (2)
                total += self._join([torch.zeros_like(x) if h is None else h for x, h in zip(xs, found, strict=True)])
                connected = connected or any(h is not None for h in found)
            doubt = doubt or unsure
        return total, doubt or not connected

    def _record(self, part: Callable[[Any], Tensor]) -> tuple[list[Tensor], list[Tensor], bool]:
        """Fresh variables, the gradient of a part by them with its graph, and whether a foreign operation is in it."""
        xs, y = self._evaluate(part, list(self._at.values()))
        gs = torch.autograd.grad(y, xs, create_graph=True, allow_unused=True)
        unsure = not self._decided and foreign(y)
        return xs, [torch.zeros_like(x) if g is None else g for x, g in zip(xs, gs, strict=True)], unsure

    def _evaluate(self, part: Callable[[Any], Tensor], values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        xs = [x.detach().clone().requires_grad_() for x in values]
        y = part(xs[0] if self._bare else dict(zip(self._at, xs, strict=True)))
        if not isinstance(y, Tensor) or y.numel() != 1 or not y.is_floating_point():
            what = f"shape {tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"f returned {what}; it must return a real scalar tensor")
        if not y.requires_grad:
            raise ValueError("f: its value does not depend on `at`; compute it from `at` by differentiable operations")
        return xs, y

    def _gradient(self, values: list[Tensor]) -> Tensor:
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for part in self._parts:
            xs, y = self._evaluate(part, values)
            gs = torch.autograd.grad(y, xs, allow_unused=True)
            total += self._join([torch.zeros_like(x) if g is None else g for x, g in zip(xs, gs, strict=True)])
        return total

    def _differences(self, v: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Hv by (3), and the norm of what rounding contributes to it."""
        low = {x.dtype for x in self._at.values()} - {torch.float32, torch.float64}
        if low:
            raise ValueError(f"at: {low.pop()} is too coarse for differences of gradients; pass float32 or float64")
        if not v.any() or not v.isfinite().all():
            return v * 0, v.new_zeros(())
        xs = list(self._at.values())
        eps = max(torch.finfo(x.dtype).eps for x in xs)
        rms = self._join(xs).square().mean().sqrt()
        h = step * (3 * eps) ** (1 / 3) * rms.clamp(min=0.01) / v.abs().max()  # (4), in units of ‖v‖
        steps = self._split(h * v)
        above = self._gradient([x + s for x, s in zip(xs, steps, strict=True)])
        below = self._gradient([x - s for x, s in zip(xs, steps, strict=True)])
        return (above - below) / (2 * h), eps * above.norm() / h  # (3)

    def _first_differences(self, v: Tensor) -> Tensor:
        """Hv by (3), and the step to keep."""
        tried = [self._differences(v, step)[0] for step in LONGER]
        change = [float((b - a).norm().nan_to_num(math.inf)) for a, b in pairwise(tried)]
        best = min(range(len(LONGER) - 2, 0, -1), key=lambda i: change[i - 1] + change[i])
        self._step = LONGER[best]
        return tried[best]

    def _contradiction(self, v: Tensor, product: Tensor) -> str:
        """How differences contradict a product, or nothing if they do not."""
        for step in SHORTER:
            quotient, noise = self._differences(v, step)
            if (product - quotient).norm() <= AGREEMENT * quotient.norm() + noise:
                return ""
        return (
            f"second derivatives are silently missing (a product of norm {product.norm():.3g} has {quotient.norm():.3g} "
            f"by differences): some backward, not one of torch's own, is not differentiable"
        )

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1).to(self.device, self.dtype) for t in tensors])

    def _split(self, vector: Tensor) -> list[Tensor]:
        xs = self._at.values()
        pieces = vector.split([x.numel() for x in xs])
        return [p.reshape(x.shape).to(x.device, x.dtype) for p, x in zip(pieces, xs, strict=True)]


def named(tree: Tensors, name: str) -> dict[str, Tensor]:
    """A dict of tensors as it is, a tensor under the name ''."""
    tensors = {"": tree} if isinstance(tree, Tensor) else dict(tree) if isinstance(tree, Mapping) else {}
    if not tensors or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise TypeError(f"{name}: a {type(tree).__name__}; pass a tensor or a dict of tensors")
    return tensors


def foreign(output: Tensor) -> bool:
    """Whether the graph of an output contains operations whose second derivative neither torch nor torchcalc answers for."""
    waiting: list[Any] = [output.grad_fn]
    seen = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):  # written in Python
            if not type(node)._forward_cls.__module__.startswith("torchcalc."):  # type: ignore[attr-defined]
                return True
        elif type(node).__name__ == "CppFunction":  # written in C++, outside torch
            return True
        waiting.extend(n for n, _ in node.next_functions)
    return False


@contextmanager
def _attention_with_second_derivative() -> Iterator[None]:
    """The kernel of scaled_dot_product_attention that can be differentiated twice; the fused ones cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
