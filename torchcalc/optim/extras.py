"""What a step can do beside its rule: clip by the global norm, skip a gradient that is not finite, round
stochastically.

Clipping.  With N = ‖g‖ over all parameters of all groups, every gradient is multiplied by

    c = min(1, max_norm/(N + 10⁻⁶)),                                              (1)

the formula of ``torch.nn.utils.clip_grad_norm_``. Here the gradients are not written: c multiplies them inside the
step, so that clipping costs one more read of them, and not also a read and a write.

Stochastic rounding.  Between the neighbours a < x < b that a half-precision format has, x becomes b with probability
(x − a)/(b − a), and else a: E[rounded x] = x. A step that is smaller than half the distance of neighbours always rounds
back to nothing; stochastically it counts now and then, by as much as it should.               (2)

References: Pascanu et al. 2013, arXiv:1211.5063 (clipping); Gupta et al. 2015, arXiv:1502.02551 (stochastic rounding).
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcalc import native
from torchcalc.native.optim import GradNorm, grad_norm
from torchcalc.optim.arguments import WHOLE
from torchcalc.optim.tensor_list import TensorList

__all__ = ["NORMAL", "Scaling", "check_extras", "clip_coefficient", "draw_seed", "global_norm", "round_stochastically_"]

ROUNDINGS = ("nearest", "stochastic")


class Scaling(NamedTuple):
    """What happens to all gradients, and to how parameters are rounded, in one step."""

    grad_scale: Tensor | None = None  # gradients are divided by it, since GradScaler has multiplied the loss by it
    coefficient: float | Tensor = 1.0  # c in (1)
    seed: int | None = None  # rounds stochastically

    def direction(self, g: Any) -> Any:
        """The gradient to follow, as a new tensor if it differs from g."""
        if self.grad_scale is not None:
            g = _times(g, _inverse(self.grad_scale))
        if isinstance(self.coefficient, Tensor) or self.coefficient != 1:
            g = _times(g, self.coefficient)
        return g


NORMAL = Scaling()


def _inverse(scale: Tensor) -> float | Tensor:
    """1/scale, rounded as GradScaler.unscale_ rounds it; on the host a number."""
    inverse = (scale if scale.device.type == "mps" else scale.double()).reciprocal().float()
    return inverse.item() if inverse.is_cpu else inverse


def _times(g: Any, factor: float | Tensor) -> Any:
    """g·factor, of g's dtype: torch promotes a 0-dimensional g to the dtype of a 0-dimensional factor."""
    if not isinstance(factor, Tensor):
        return g.mul(factor)
    scaled = g.mul(factor.to(g.device))
    if isinstance(scaled, TensorList):
        return TensorList([t.to(g.dtype) for t in scaled.tensors])
    return scaled.to(g.dtype)


def check_extras(max_norm: float | None, skip_nonfinite: bool, rounding: str) -> None:
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"Invalid max_norm: {max_norm}; it must be >= 0 (inf only measures), or None to clip nothing")
    if rounding not in ROUNDINGS:
        raise ValueError(f"Invalid rounding: {rounding!r}; use one of {ROUNDINGS}")


def check_group_extras(group: dict[str, Any]) -> None:
    """They are the optimizer's, since a norm is one of all groups: refused where they would change nothing."""
    for name in WHOLE:
        if name in group:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group; it is for all groups: pass it to the optimizer"
            )


def clip_coefficient(norm: float | Tensor, max_norm: float) -> float | Tensor:
    """(1); on the host if norm is a number."""
    if max_norm == math.inf:
        return 1.0
    if isinstance(norm, Tensor):
        return (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
    if math.isnan(norm):
        return norm
    return min(1.0, max_norm / (norm + 1e-6))


_is_plain = functools.partial(operator.is_, Tensor)  # no subclass


class Norm(NamedTuple):
    """‖g‖ over all gradients, and whether every element is finite; tensors where the gradients are not on the host."""

    value: float | Tensor
    finite: bool | Tensor


def global_norm(grads: list[Tensor]) -> Norm:
    """The 2-norm of all gradients together, over all shards of DTensors: every rank gets the same."""
    fast = _by_kernel(grads)
    if fast is not None:
        return Norm(fast.squared**0.5, fast.finite)
    distributed = sys.modules.get("torch.distributed.tensor")
    plain: list[Tensor] = []
    sharded: dict[Any, list[Tensor]] = defaultdict(list)
    for g in grads:
        if distributed is None or not isinstance(g, distributed.DTensor):
            plain.append(g)
        elif any(placement.is_partial() for placement in g.placements):
            plain.append(g.full_tensor())
        else:
            sharded[g.device_mesh, g.placements].append(g._local_tensor)
    parts = [_squared(plain)] if plain else []
    if sharded:
        from torchcalc.distributed import all_reduce_  # there may be none in torch
    for (mesh, placements), locals_ in sharded.items():
        squared, finite = _squared(locals_)
        squared, finite = (torch.as_tensor(x, dtype=torch.float64, device=locals_[0].device) for x in (squared, finite))
        total = torch.stack([squared, 1.0 - finite])
        for dim, placement in enumerate(placements):
            # Not is_shard(): the strided shards of two-dimensional sharding are none, in torch's words.
            if not placement.is_replicate():
                all_reduce_(total, mesh.get_group(dim))
        on_host = total.is_cpu
        parts.append((total[0].item(), total[1].item() == 0) if on_host else (total[0], total[1] == 0))
    squared = sum((_on_one(s, parts) for s, _ in parts), 0.0)
    finite = True
    for _, f in parts:
        finite = f if finite is True else finite & _on_one(f, parts)
    return Norm(squared**0.5, finite)


def _by_kernel(grads: list[Tensor]) -> GradNorm | None:
    """The kernel itself refuses what is not dense, real and on the CPU; a subclass would have to know its operator."""
    if not all(map(_is_plain, map(type, grads))):
        return None
    return grad_norm(grads) if native.available() or native.warn_once(grads) else None


def _on_one(x: Any, parts: list[Any]) -> Any:
    """Tensors of several devices meet on the first one."""
    device = next((s.device for s, _ in parts if isinstance(s, Tensor)), None)
    return x.to(device) if isinstance(x, Tensor) else x


def _squared(grads: list[Tensor]) -> tuple[Any, Any]:
    """(Σ g², all finite) of all but DTensors, in float64: the squares of finite float32 do not overflow there."""
    fast = _by_kernel(grads)
    if fast is not None:
        return fast
    grads = [g.coalesce().values() if g.is_sparse else g for g in grads]
    grads = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads]
    on_host = all(g.is_cpu for g in grads)
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).to(grads[0].device) for g in grads])
    squared = norms.square().sum()
    finite = squared.isfinite()
    if not on_host:
        return squared, finite
    return squared.item(), bool(finite) or all(bool(g.isfinite().all()) for g in grads)


def draw_seed() -> int:
    """Drawn from torch's generator: torch.manual_seed makes stochastic rounding reproducible."""
    return int(torch.randint(2**62, (), device="cpu").item())


def round_stochastically_(p: Tensor, x: Tensor) -> None:
    """(2): p ← x, where p is bfloat16 or float16 and x float32."""
    nearest = x.to(p.dtype)
    error = x - nearest.float()
    # Neighbours in value are neighbours as integers, of sign and magnitude: one more is one farther from zero.
    away = torch.sign(error) == torch.where(nearest == 0, torch.sign(error), torch.sign(nearest.float()))
    bits = torch.where(nearest == 0, torch.where(error < 0, -32768, 0).short().view(p.dtype), nearest).view(torch.int16)
    neighbour = torch.where(away, bits + 1, bits - 1).view(p.dtype)
    probability = error / (neighbour.float() - nearest.float())
    moves = (torch.rand_like(x) < probability) & neighbour.isfinite() & (error != 0)
    p.copy_(torch.where(moves, neighbour, nearest))
