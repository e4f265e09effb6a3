"""Curvature: how fast the slope changes. The largest eigenvalue λ of the Hessian of a loss, its sharpness.

    f(x + r·u) = f(x) + r·∇fᵀu + r²/2 · uᵀHu + O(r³)                              (1)

The curvature along u is uᵀHu/uᵀu, a Rayleigh quotient: it lies between the smallest and the largest eigenvalue of H,
and gradient descent with a step beyond 2/λ overshoots along that eigenvector more every time.

Lanczos.  Orthonormal v₁ … v_k that span the Krylov space of v₁ make H a small matrix T = VᵀHV, and

    H·v_k = Σᵢ vᵢ·Tᵢₖ + β·v_{k+1},    Tᵢₖ = vᵢᵀHv_k                               (2)
    HV = VT + β·v_{k+1}·e_kᵀ                                                      (3)

where (2) says what v_{k+1} is, and exact arithmetic makes T tridiagonal. In floating point V loses its orthogonality
just when an eigenvalue converges, and copies of the eigenvalue appear; so every new vector is orthogonalised against
all the others, twice. An eigenpair Ts = θs gives y = Vs with, by (3),

    Hy − θy = β·s_k·v_{k+1},    ‖Hy − θy‖ = |β·s_k| =: residual                   (4)

and H, being symmetric, has an eigenvalue within one residual of θ. When the basis is full, the best Ritz vectors Vs
and v_{k+1} are a new basis in which (3) still holds with T = diag(θ): a thick restart bounds the memory.

A start from the last eigenvector needs few products: too few, because an eigenvector that has been overtaken by another
is still an eigenvector, and would be found again for ever. So the start has noise mixed in, half as long as it and
different from start to start, and at least six products are made: all but one of them are then a Krylov space of the
noise, in which what has overtaken stands out, the sooner the further it has. An overtaking by 5 % among 10⁵ eigenvalues,
or by 10 % among 10⁶, can stay unseen for a call or more: the residual tells of the one eigenvector only.

Metric.  With a step P⁻¹∇f (P > 0 diagonal, as of Adam) let z = P^½x; then z takes plain gradient steps, and its Hessian is
P^-½·H·P^-½.                                                                      (5)

References: Lanczos 1950, doi:10.6028/jres.045.026; Wu, Simon 2000, doi:10.1137/S0895479898334605 (thick restart);
Cohen et al. 2021, arXiv:2103.00065 (sharpness and the edge of stability).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchcalc.calculus.hessian_product import HessianProduct
from torchcalc.calculus.variables import Tensors

__all__ = ["Curvature", "curvature", "curvature_along"]

NOISE = (
    0.5  # mixed into a warm start, as a multiple of it: 0.1 leaves 1.1 unseen by 1 in 10⁵, 1 makes 4 products too few
)
FEWEST = 6  # products, unless the residual vanishes


@dataclass(frozen=True)
class Curvature:
    """The largest eigenvalue of a Hessian, and how well it is known.

    Attributes:
        value: λ; nan where a Hessian-vector product was not finite.
        vector: its eigenvector, of norm 1, a tensor or dict like the point; with a metric that of P^-½·H·P^-½.
        residual: ‖Hu − λu‖: an eigenvalue lies within this distance of ``value``; but no less than the unit of rounding of
            the coarsest dtype at the point, times the largest eigenvalue in size.
        products: Hessian-vector products spent.
        converged: whether the residual is as small as asked for, or as rounding permits.
        method: "exact" second derivatives, or "differences" of gradients.
        reason: why differences, or why exact products could not be checked; else empty.

    >>> found = curvature(lambda x: x[0] ** 2 + 10 * x[1] ** 2, torch.tensor([3.0, 1.0]))
    >>> round(found.value, 4), found.converged, found.method  # the Hessian is diag(2, 20)
    (20.0, True, 'exact')
    """

    value: float
    vector: Any
    residual: float
    products: int
    converged: bool
    method: Literal["exact", "differences"]
    reason: str = ""

    def __str__(self) -> str:
        done = "" if self.converged else ", not converged"
        how = "exact" if self.method == "exact" else "by differences of gradients"
        how += f": {self.reason}" if self.reason else ""
        return f"λ = {self.value:.6g} ± {self.residual:.2g} ({self.products} Hessian-vector products{done}, {how})"


def curvature(
    f: Callable[[Any], Tensor],
    at: Tensors,
    *,
    metric: Tensors | None = None,
    start: Tensors | None = None,
    tolerance: float = 1e-3,
    max_products: int = 100,
    basis: int = 24,
    generator: torch.Generator | None = None,
) -> Curvature:
    """The largest (algebraic) eigenvalue of the Hessian of f, and its eigenvector, by Lanczos; the Hessian is never formed.

    The price is that of about two gradients for each product and of two to four to check the first, and memory for
    ``basis`` vectors like ``at`` and about six more (eight with a metric).

    Args:
        f: from a tensor, or a dict of tensors, to a real scalar tensor, such as a :func:`training_loss`.
        at: the point; real float tensors.
        metric: P, like ``at`` and positive: eigenvalues of P^-½·H·P^-½ instead (5).
        start: where to begin, like ``at``: the ``.vector`` of the last time; otherwise at random.
        tolerance: the residual, relative to λ, at which to stop, > 0.
        max_products: or after so many Hessian-vector products, >= 1.
        basis: vectors kept, >= 3; when there are so many, half of them are kept (a restart), and more products are needed.
        generator: of the noise to start from (on any device); by default one of its own, seeded by ``start``: the same
            call has the same result.

    Returns:
        :class:`Curvature`. Where an operation in f has no second derivative, products are central differences of
        gradients; ``.method`` and a warning say so.

    Raises:
        ValueError: f returns no scalar or does not depend on ``at``; metric or start not like ``at``; metric not
            positive; tolerance, max_products or basis out of range.
        TypeError: ``at`` is not of a real float dtype.

    Reference: Lanczos 1950, doi:10.6028/jres.045.026.

    >>> found = curvature(lambda x: x[0] ** 2 + 10 * x[1] ** 2, torch.tensor([3.0, 1.0]))  # H = diag(2, 20)
    >>> round(found.value, 3), found.vector.abs().round(decimals=3)
    (20.0, tensor([0., 1.]))
    """
    if not (isinstance(tolerance, (int, float)) and 0 < tolerance < 1):
        raise ValueError(f"tolerance: {tolerance}; it must be in (0, 1)")
    if not (isinstance(max_products, int) and max_products >= 1):
        raise ValueError(f"max_products: {max_products}; it must be an int, at least 1")
    if not (isinstance(basis, int) and basis >= 3):
        raise ValueError(f"basis: {basis}; it must be an int, at least 3")
    hessian = HessianProduct(f, at)
    scale = None
    if metric is not None:
        scale = hessian.flat(metric, "metric")
        if not bool((scale > 0).all() and scale.isfinite().all()):
            raise ValueError(f"metric: its smallest element is {float(scale.min())}; all must be positive and finite")
        scale = scale.rsqrt()

    def product(v: Tensor) -> Tensor:
        return hessian(v) if scale is None else hessian(scale * v).mul_(scale)  # (5)

    pair = _lanczos(product, _start(hessian, start, generator), tolerance, max_products, basis)
    _warn(hessian)
    residual = max(pair.residual, hessian.eps * pair.size) if pair.residual == pair.residual else math.nan
    turned = start is not None and float(pair.vector @ hessian.flat(start, "start")) < 0
    vector = hessian.like(pair.vector.neg_() if turned else pair.vector)
    return Curvature(pair.value, vector, residual, pair.products, pair.converged, hessian.method, hessian.reason)


def curvature_along(f: Callable[[Any], Tensor], at: Tensors, direction: Tensors) -> float:
    """The curvature of f along a direction, vᵀHv/vᵀv, from one Hessian-vector product.

    Args:
        f: from a tensor, or a dict of tensors, to a real scalar tensor.
        at: the point; real float tensors.
        direction: v, like ``at`` and not zero; its length does not matter.

    Raises:
        ValueError: as :func:`curvature`; or direction is zero or not finite.

    A warning says where differences of gradients stood in for second derivatives.

    >>> x = torch.tensor([3.0, 1.0])
    >>> curvature_along(lambda x: x[0] ** 2 + 10 * x[1] ** 2, x, torch.tensor([1.0, 1.0]))  # (2 + 20)/2
    11.0
    """
    hessian = HessianProduct(f, at)
    v = hessian.flat(direction, "direction")
    norm = v.norm()
    if not 0 < norm < math.inf:
        raise ValueError(f"direction: its norm is {float(norm)}; it must be positive and finite")
    along = float(v.double() @ hessian(v).double()) / float(v.double() @ v.double())
    _warn(hessian)
    return along


def _warn(hessian: HessianProduct) -> None:
    if hessian.method == "differences":
        warnings.warn(f"the Hessian is taken by differences of gradients: {hessian.reason}", stacklevel=3)


def _start(hessian: HessianProduct, start: Tensors | None, generator: torch.Generator | None) -> Tensor:
    """A unit vector: noise, and the one given mixed into it; the same noise for the same one."""
    v = None if start is None else hessian.flat(start, "start")
    if generator is None:
        generator = torch.Generator().manual_seed(0 if v is None else hash(float(v.sum(dtype=torch.float64))))
    noise = torch.randn(hessian.size, generator=generator, dtype=hessian.dtype, device=generator.device)
    noise = noise.to(hessian.device)
    noise /= noise.norm()
    if v is None:
        return noise
    norm = v.norm()
    if not 0 < norm < math.inf:
        raise ValueError(f"start: its norm is {float(norm)}; it must be positive and finite, or None")
    v = v / norm + NOISE * noise
    return v / v.norm()


class _Ritz(NamedTuple):
    value: float
    vector: Tensor
    residual: float
    products: int
    converged: bool
    size: float  #: of the largest Ritz value


def _lanczos(
    product: Callable[[Tensor], Tensor], v: Tensor, tolerance: float, max_products: int, vectors: int
) -> _Ritz:
    """The largest eigenpair, from the unit vector v; with full reorthogonalisation and thick restarts."""
    n, eps = v.numel(), torch.finfo(v.dtype).eps
    size = min(vectors, n, max_products)
    V = v.new_empty(size, n)
    T = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    k = 0
    for products in range(1, max_products + 1):
        V[k] = v
        v = V[k]  # nothing else holds what it was
        basis = V[: k + 1]
        w = product(v)
        if not bool(torch.stack(w.aminmax()).isfinite().all()):  # without a copy
            return _Ritz(math.nan, v.clone(), math.nan, products, False, math.nan)
        c = basis @ w
        w.addmv_(basis.T, c, alpha=-1)
        again = basis @ w  # what rounding has left of it
        w.addmv_(basis.T, again, alpha=-1)
        T[k, : k + 1] = T[: k + 1, k] = (c + again).double().cpu()  # (2)
        beta = float(w.norm())
        theta, s = torch.linalg.eigh(T[: k + 1, : k + 1])
        value, residual = float(theta[-1]), beta * abs(float(s[-1, -1]))  # (4)
        largest = float(theta.abs().max())
        rounding = 10 * eps * largest
        small = residual <= tolerance * abs(value) and products >= FEWEST
        converged = small or residual <= rounding or k + 1 == n
        if converged or products == max_products:
            break
        v = w.div_(beta)
        k += 1
        if k == size:  # thick restart
            k = size // 2
            V[:k] = s[:, -k:].T.to(V) @ V
            T = T.new_zeros(size, size)
            T[:k, :k] = theta[-k:].diag()
    y = s[:, -1].to(V) @ V[: s.shape[0]]
    return _Ritz(value, y.div_(y.norm()), residual, products, converged, largest)
