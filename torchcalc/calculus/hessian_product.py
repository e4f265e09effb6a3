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
kinks: n of them between x ± h·u, each of random sign, add a noise of √n/h ~ 1/√h, and longer steps are better. So on the
first vector steps from 1000h to h/1000 are tried, and the one is kept whose quotient changes least to the next longer
and shorter one. The result is the curvature averaged over that distance.

No second derivative is often no error in torch: what ``once_differentiable`` guards, or a backward that works on
detached tensors or in NumPy, is taken for a constant, and its share of Hv is silently zero. torch's own operations are
right or raise, and so are torchcalc's. The mark of ``once_differentiable`` can be seen, and settles it. Where a graph
contains other operations that are not torch's, and where Hv is zero because no path leads from g back to x (as it must
be for linear f), the first product p is compared with the quotients qᵢ of the same scan. By (3) qᵢ is wrong by about as
much as it differs from the quotient qᵢ₋₁ of a ten times longer step, and by rounding:

    dᵢ = ‖qᵢ − qᵢ₋₁‖ + ‖v‖·e/hᵢ                                                   (5)

and p is believed if ‖p − qᵢ‖ ≤ 3dᵢ + 10⁻⁴·‖qᵢ‖ where dᵢ is least. Less than that can be missing unseen. Where kinks
leave the least dᵢ above 3 % of the quotient, p is believed if it agrees to a tenth with one of the shorter steps, which
meet few kinks or none. In bfloat16 and float16 there are no quotients: p is believed, and ``reason`` says so.

Reference: Pearlmutter 1994, "Fast exact multiplication by the Hessian", doi:10.1162/neco.1994.6.1.147; Nocedal, Wright
2006, "Numerical optimization", section 8.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchcalc.calculus.operations import foreign, once
from torchcalc.calculus.training_loss import TrainingLoss
from torchcalc.calculus.variables import Tensors, like, named

__all__ = ["HessianProduct"]

STEPS = (1000.0, 100.0, 10.0, 1.0, 0.1, 0.01, 0.001)  # tried on the first vector, in units of (4)
JUDGES = STEPS[2:]  # whose quotients a product is compared with: in longer ones truncation agrees with itself
DOUBTFUL = 0.03  # of a quotient, is (5) on functions with kinks, and 10⁻³ or less on smooth ones
AGREEMENT = 0.1  # of a product with a quotient, by which it is believed there


class _Quotient(NamedTuple):
    step: float
    value: Tensor
    noise: float  #: the norm of what rounding contributes


class HessianProduct:
    """v ↦ Hv of f at x, on flat vectors: float64 if an element of x is, else float32.

    Attributes:
        method: "exact", by (2), or "differences", by (3); decided by the first product.
        reason: why differences, in words; or why an exact product could not be checked.
        size: elements of x.
        eps: the unit of rounding of their coarsest dtype.
    """

    def __init__(self, f: Callable[[Any], Tensor], at: Tensors) -> None:
        self._parts: Sequence[Callable[[Any], Tensor]] = f.parts if isinstance(f, TrainingLoss) else [f]
        self._bare = isinstance(at, Tensor)
        self._at = named(at, "at")
        self.size = sum(x.numel() for x in self._at.values())
        if not self.size:
            raise ValueError("at: it has no elements; pass what f is to be differentiated by")
        self.device = next(iter(self._at.values())).device
        self.dtype = torch.float64 if any(x.dtype == torch.float64 for x in self._at.values()) else torch.float32
        self.eps = max(torch.finfo(x.dtype).eps for x in self._at.values())
        self.method: Literal["exact", "differences"] = "exact"
        self.reason = ""
        self._decided = False
        self._step = 1.0
        self._graph: tuple[list[Tensor], list[Tensor], bool] | None = None

    def flat(self, tree: Tensors, name: str) -> Tensor:
        """A tensor or dict like x, as one vector."""
        alike: Any = like(tree, self._at[""] if self._bare else self._at, name, "`at`")
        return self._join([t.detach() for t in ([alike] if self._bare else alike.values())])

    def like(self, vector: Tensor) -> Any:
        """One vector, as a tensor or dict like x."""
        pieces = dict(zip(self._at, self._split(vector), strict=True))
        return pieces[""] if self._bare else pieces

    def __call__(self, v: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), _attention_with_second_derivative():
            if self.method == "differences":
                return self._difference(v, self._step).value
            scan: list[_Quotient] = []
            try:
                product, unsure = self._exact(v)
                if self._decided or not unsure:
                    self._decided = True
                    return product
                if low := self._low():
                    self._decided, self.reason = True, f"unchecked: {low} is too coarse for differences of gradients"
                    return product
                scan = self._scan(v)
                self.reason = self._contradiction(product, scan)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, AssertionError, TypeError) as error:  # what a backward may refuse by
                self.reason = str(error).split("\n")[0] or type(error).__name__
            self._decided = True
            if not self.reason:
                return product
            self.method, self._graph = "differences", None
            return self._kept(scan or self._scan(v))  # if f itself is at fault, this raises its error

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
        if unsure and (reason := once(y)):
            raise RuntimeError(reason)
        return xs, [torch.zeros_like(x) if g is None else g.to_dense() for x, g in zip(xs, gs, strict=True)], unsure

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

    def _low(self) -> torch.dtype | None:
        return next((x.dtype for x in self._at.values() if x.dtype not in (torch.float32, torch.float64)), None)

    def _difference(self, v: Tensor, step: float) -> _Quotient:
        """Hv by (3), with a step in units of (4)."""
        if low := self._low():
            raise ValueError(f"at: {low} is too coarse for differences of gradients; pass float32 or float64")
        if not v.any() or not v.isfinite().all():
            return _Quotient(step, v * 0, 0.0)
        xs = list(self._at.values())
        rms = self._join(xs).square().mean().sqrt()
        h = step * (3 * self.eps) ** (1 / 3) * rms.clamp(min=0.01) / v.abs().max()  # (4), in units of ‖v‖
        steps = self._split(h * v)
        above = self._gradient([x + s for x, s in zip(xs, steps, strict=True)])
        below = self._gradient([x - s for x, s in zip(xs, steps, strict=True)])
        return _Quotient(step, (above - below) / (2 * h), float(self.eps * above.norm() / h))  # (3)

    def _scan(self, v: Tensor) -> list[_Quotient]:
        return [self._difference(v, step) for step in STEPS]

    def _kept(self, scan: list[_Quotient]) -> Tensor:
        """Hv by the step that is kept."""
        change = [_norm(b.value - a.value) for a, b in pairwise(scan)]
        best = min(range(len(scan) - 2, 0, -1), key=lambda i: change[i - 1] + change[i])
        self._step = scan[best].step
        return scan[best].value

    def _contradiction(self, product: Tensor, scan: list[_Quotient]) -> str:
        """How differences contradict a product, or nothing if they do not."""
        judges = [q for q in scan if q.step in JUDGES]
        doubts = [(_norm(b.value - a.value) + b.noise, b) for a, b in pairwise(judges)]  # (5)
        doubt, best = min(doubts, key=lambda pair: pair[0])
        size = _norm(best.value)
        if doubt < DOUBTFUL * size:
            right = _norm(product - best.value) <= 3 * doubt + 1e-4 * size
        else:
            right = any(_norm(product - q.value) <= AGREEMENT * _norm(q.value) + q.noise for q in judges if q.step <= 1)
        return (
            ""
            if right
            else f"second derivatives are silently missing (a product of norm {_norm(product):.3g} has {size:.3g} by "
            "differences): some backward, not one of torch's own, is not differentiable"
        )

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.to_dense().reshape(-1).to(self.device, self.dtype) for t in tensors])

    def _split(self, vector: Tensor) -> list[Tensor]:
        xs = self._at.values()
        pieces = vector.split([x.numel() for x in xs])
        return [p.reshape(x.shape).to(x.device, x.dtype) for p, x in zip(pieces, xs, strict=True)]


def _norm(x: Tensor) -> float:
    return float(x.norm().nan_to_num(math.inf))


@contextmanager
def _attention_with_second_derivative() -> Iterator[None]:
    """The kernel of scaled_dot_product_attention that can be differentiated twice; the fused ones cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
