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
detached tensors or in NumPy, is taken for a constant, and its share of Hv is silently zero. Nor is torch always right:
in 2.13 the second derivative of weight normalisation is not. The mark of ``once_differentiable`` can be seen, and settles
it. Otherwise the first product p is compared with quotients qᵢ from steps that shrink tenfold. By (3) qᵢ is wrong by
about as much as it differs from the quotient qᵢ₋₁ of the longer step, and by rounding:

    dᵢ = ‖qᵢ − qᵢ₋₁‖ + ‖v‖·e/hᵢ                                                   (5)

Where the graph consists of operations of torch and torchcalc, p is believed if it agrees with the quotient of step (4)
to 10⁻³, and not if it differs by five times that although dᵢ is smaller. What is left has kinks, where quotients are an
average that p need not equal. There symmetry decides, which holds beside any kink, and which wrong formulas break: with a
random u

    uᵀ(Hv) = vᵀ(Hu).                                                              (6)

Operations of others may be constants to a part of H and leave it symmetric. There p is believed if
‖p − qᵢ‖ ≤ 3dᵢ + 10⁻⁴·‖qᵢ‖ where dᵢ is least. Where kinks leave the least dᵢ above 3 % of the quotient, p is believed if it
agrees to a tenth with one of the shorter steps, which meet few kinks or none. Smaller errors go unnoticed.

In bfloat16 and float16 there are no quotients, nor where they overflow, as beside the weights of a training that diverged:
p is believed, and ``reason`` says so. Where float16 overflows on the way, x is taken in float32; if f refuses that, it is
multiplied by a power of two, which is exact, and the product divided by it.

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

from torchcalc.calculus.operations import foreign, leaves, once
from torchcalc.calculus.training_loss import TrainingLoss
from torchcalc.calculus.variables import Tensors, like, named

__all__ = ["HessianProduct", "Unconnected", "attention_with_second_derivative"]

STEPS = (1000.0, 100.0, 10.0, 1.0, 0.1, 0.01, 0.001)  # tried on the first vector, in units of (4)
JUDGES = STEPS[2:]  # whose quotients a product is compared with: in longer ones truncation agrees with itself
DOUBTFUL = 0.03  # of a quotient, is (5) on functions with kinks, and 10⁻³ or less on smooth ones
AGREEMENT = 0.1  # of a product with a quotient, by which it is believed there
CLOSE = 1e-3  # likewise for torch's operations; and of the two sides of (6)
SCALES = (2.0**-8, 2.0**-16)  # of f, until a product is finite in float16


class Unconnected(ValueError):
    """No differentiable path leads from what f is differentiated by to its value."""


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
        foreign: whether the first product met operations for which neither torch nor torchcalc answers.
        outside: whether f depends on other variables as well.
        mistaken: whether torch's own second derivative was found to be wrong.
    """

    def __init__(self, f: Callable[[Any], Tensor], at: Tensors) -> None:
        self._parts: Sequence[Callable[[Any], Tensor]] = f.parts if isinstance(f, TrainingLoss) else [f]
        self._bare = isinstance(at, Tensor)
        self._at = named(at, "at")
        self._dtypes = [x.dtype for x in self._at.values()]
        self.size = sum(x.numel() for x in self._at.values())
        if not self.size:
            raise ValueError("at: it has no elements; pass what f is to be differentiated by")
        self.device = next(iter(self._at.values())).device
        self.dtype = torch.float64 if any(x.dtype == torch.float64 for x in self._at.values()) else torch.float32
        self.eps = max(torch.finfo(x.dtype).eps for x in self._at.values())
        self.method: Literal["exact", "differences"] = "exact"
        self.reason = ""
        self.foreign = self.outside = self.mistaken = False
        self._decided = False
        self._step = self._scale = 1.0
        self._graph: tuple[list[Tensor], list[Tensor]] | None = None

    def flat(self, tree: Tensors, name: str) -> Tensor:
        """A tensor or dict like x, as one vector."""
        alike: Any = like(tree, self._at[""] if self._bare else self._at, name, "`at`")
        return self._join([t.detach() for t in ([alike] if self._bare else alike.values())])

    def like(self, vector: Tensor) -> Any:
        """One vector, as a tensor or dict like x."""
        pieces = [p.to(dtype) for p, dtype in zip(self._split(vector), self._dtypes, strict=True)]
        return pieces[0] if self._bare else dict(zip(self._at, pieces, strict=True))

    def __call__(self, v: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad(), attention_with_second_derivative():
            if self.method == "differences":
                return self._difference(v, self._step).value
            scan: list[_Quotient] = []
            try:
                product, connected = self._finite(v)
                if self._decided:
                    return product
                if low := self._low():
                    self._decided, self.reason = True, f"unchecked: {low} is too coarse for differences of gradients"
                    return product
                if self.foreign:
                    scan = self._scan(v)
                    if not _comparable(scan):
                        self._decided, self.reason = True, "unchecked: differences of gradients overflow"
                        return product
                    self.reason = self._contradiction(product, scan)
                else:
                    self.reason = self._mistake(product, v, connected)
                    self.mistaken = bool(self.reason)
            except (torch.OutOfMemoryError, Unconnected):
                raise
            except (RuntimeError, AssertionError, TypeError) as error:  # what a backward may refuse by
                self.reason = str(error).split("\n")[0] or type(error).__name__
            self._decided = True
            if not self.reason:
                return product
            self.method, self._graph = "differences", None
            return self._kept(scan or self._scan(v))  # if f itself is at fault, this raises its error

    def _finite(self, v: Tensor) -> tuple[Tensor, bool]:
        """Hv by (2), and whether g depends on x; where it overflows in float16, in float32 or by a smaller multiple of f."""
        product, connected = self._exact(v)
        if self._decided or self._low() != torch.float16 or bool(product.isfinite().all()):
            return product, connected
        at, self._graph = self._at, None
        try:
            self._at = {k: x.float() if x.dtype == torch.float16 else x for k, x in at.items()}
            return self._exact(v)
        except RuntimeError:  # f takes nothing but float16
            self._at, self._graph = at, None
        for self._scale in SCALES:
            scaled, connected = self._exact(v)
            if bool(scaled.isfinite().all()):
                return scaled, connected
            self._graph = None
        self._scale = 1.0
        return product, connected

    def _exact(self, v: Tensor) -> tuple[Tensor, bool]:
        total, connected = torch.zeros_like(v), False
        ws = self._split(v)
        for part in self._parts:
            xs, gs = self._graph or self._record(part)
            live = [j for j, g in enumerate(gs) if g.requires_grad]
            keep = len(self._parts) == 1  # the graphs of many batches at once may not fit
            if keep:
                self._graph = xs, gs
            if live:
                outputs, vs = [gs[j] for j in live], [ws[j] for j in live]
                found = torch.autograd.grad(outputs, xs, vs, retain_graph=keep, allow_unused=True)  # (2)
                self._add(total, found)
                connected = connected or any(h is not None for h in found)
        return (total if self._scale == 1 else total.div_(self._scale)), connected

    def _record(self, part: Callable[[Any], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh variables, and the gradient of a part by them with its graph."""
        xs, y = self._evaluate(part, list(self._at.values()))
        gs = torch.autograd.grad(y, xs, torch.full_like(y, self._scale), create_graph=True, allow_unused=True)
        if not self._decided:
            self.foreign = self.foreign or foreign(y)
            self.outside = self.outside or any(all(leaf is not x for x in xs) for leaf in leaves(y))
            if self.foreign and (reason := once(y)):
                raise RuntimeError(reason)
        return xs, [torch.zeros_like(x) if g is None else g.to_dense() for g, x in zip(gs, xs, strict=True)]

    def _evaluate(self, part: Callable[[Any], Tensor], values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        xs = [(x.clone() if x.is_inference() else x.detach()).requires_grad_() for x in values]
        y = part(xs[0] if self._bare else dict(zip(self._at, xs, strict=True)))
        if not isinstance(y, Tensor) or y.numel() != 1 or not y.is_floating_point():
            what = f"shape {tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"f returned {what}; it must return a real scalar tensor")
        if not y.requires_grad:
            raise Unconnected("f: its value does not depend on `at`; compute it from `at` by differentiable operations")
        return xs, y

    def _gradient(self, values: list[Tensor], total: Tensor | None = None, sign: int = 1) -> Tensor:
        """∇f at some values, or the total with its multiple added."""
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device) if total is None else total
        for part in self._parts:
            xs, y = self._evaluate(part, values)
            self._add(total, torch.autograd.grad(y, xs, allow_unused=True), sign)
        return total

    def _add(self, total: Tensor, pieces: Sequence[Tensor | None], sign: int = 1) -> None:
        """Add pieces like x to a vector in place: at most one of them is copied at a time."""
        for place, piece in zip(total.split([x.numel() for x in self._at.values()]), pieces, strict=True):
            if piece is not None:
                place.add_(piece.to_dense().reshape(-1).to(self.device, self.dtype), alpha=sign)

    def _low(self) -> torch.dtype | None:
        return next((x.dtype for x in self._at.values() if x.dtype not in (torch.float32, torch.float64)), None)

    def _difference(self, v: Tensor, step: float) -> _Quotient:
        """Hv by (3), with a step in units of (4)."""
        if low := self._low():
            raise ValueError(f"at: {low} is too coarse for differences of gradients; pass float32 or float64")
        if not v.any() or not v.isfinite().all():
            return _Quotient(step, v * 0, 0.0)
        xs = list(self._at.values())
        rms = torch.stack([x.norm().to(v) for x in xs]).norm() / self.size**0.5
        h = step * (3 * self.eps) ** (1 / 3) * rms.clamp(min=0.01) / v.abs().max()  # (4), in units of ‖v‖
        there = lambda h: [x + s * h.to(s) for x, s in zip(xs, self._split(v), strict=True)]  # noqa: E731
        above = self._gradient(there(h))
        noise = float(self.eps * above.norm() / h)
        return _Quotient(step, self._gradient(there(-h), above, -1).div_(2 * h), noise)  # (3)

    def _scan(self, v: Tensor) -> list[_Quotient]:
        return [self._difference(v, step) for step in STEPS]

    def _kept(self, scan: list[_Quotient]) -> Tensor:
        """Hv by the step that is kept."""
        change = [_norm(b.value - a.value) for a, b in pairwise(scan)]
        best = min(range(len(scan) - 2, 0, -1), key=lambda i: change[i - 1] + change[i])
        self._step = scan[best].step
        return scan[best].value

    def _mistake(self, product: Tensor, v: Tensor, connected: bool) -> str:
        """What is wrong with a product by torch's own operations, or nothing if it is right."""
        near = self._difference(v, 1.0)
        size, gap = _norm(near.value), _norm(product - near.value)
        if gap <= CLOSE * size + (0 if connected else 3 * near.noise):
            return ""
        doubt = _norm(near.value - self._difference(v, 10.0).value) + near.noise  # (5)
        if doubt <= CLOSE * size and gap > 5 * CLOSE * size:
            return f"torch's own second derivative is wrong: {_found(product, near.value)}"
        noise = near.noise
        del near  # a vector as large as x
        generator = torch.Generator().manual_seed(1)
        u = torch.randn(self.size, generator=generator, dtype=self.dtype, device="cpu").to(self.device)
        other = self._exact(u)[0]
        left, right = (float((a * b).sum(dtype=torch.float64)) for a, b in ((u, product), (v, other)))
        # What the quotient's own rounding hides it cannot mend: beside the weights of a training that diverged H is all but 0.
        if abs(left - right) > CLOSE * (_norm(product) + _norm(other) * _norm(v) / self.size**0.5) + noise:  # (6)
            return (
                f"torch's own second derivative is wrong: it is not symmetric, uᵀHv = {left:.3g} and vᵀHu = {right:.3g}"
            )
        return ""

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
            else f"second derivatives are silently missing ({_found(product, best.value)}): some backward, not one of "
            "torch's own, is not differentiable"
        )

    def _join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.to_dense().reshape(-1).to(self.device, self.dtype) for t in tensors])

    def _split(self, vector: Tensor) -> list[Tensor]:
        xs = self._at.values()
        pieces = vector.split([x.numel() for x in xs])
        return [p.reshape(x.shape).to(x.device, x.dtype) for p, x in zip(pieces, xs, strict=True)]


def _comparable(scan: list[_Quotient]) -> bool:
    """Whether two successive judges are finite: where a training has diverged, none may be."""
    judges = [math.isfinite(_norm(q.value)) for q in scan if q.step in JUDGES]
    return any(a and b for a, b in pairwise(judges))


def _norm(x: Tensor) -> float:
    return float(x.norm().nan_to_num(math.inf))


def _found(product: Tensor, quotient: Tensor) -> str:
    gap = _norm(product - quotient)
    return (
        f"a product of norm {_norm(product):.3g} differs by {gap:.3g} from differences, of norm {_norm(quotient):.3g}"
    )


@contextmanager
def attention_with_second_derivative() -> Iterator[None]:
    """The kernel of scaled_dot_product_attention that can be differentiated twice; the fused ones cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
