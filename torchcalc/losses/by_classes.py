"""linear_cross_entropy by chunks of classes, whose logits are computed again in backward.

Derivation.  With q the weights of a sample's classes (cross_entropy.py), Q = Σ_v q_v, and ℓ = log Σ_v e^(z_v) its log-sum-exp,

    L_n = Q·ℓ - Σ_v q_v·z_v + ζ·ℓ²,                                               (1)

in which ℓ, Σ q·z and the target's own logit are sums over classes (ℓ by log-add-exp): a chunk of classes at a time
serves, for all samples. From ℓ alone a chunk's gradient follows,

    ∂L_n/∂z_v = (Q + 2ζ·ℓ)·e^(z_v - ℓ) - q_v,                                     (2)

and of the layer's (linear_cross_entropy.py) ∂L/∂W_v and ∂L/∂b_v belong to the chunk: they are written once, in W's own dtype, and
need no memory beside the gradient itself. ∂L/∂X is summed over the chunks. What is kept is one number a sample; what it costs
is one matrix product more.

Most classes have a probability near 0 for every sample, and slopes below what bfloat16 resolves. With filter_eps = ε a class
takes no part in the products of backward if its slopes (2), each times its sample's share in the loss, are at most ε·s in size,
where s is the largest share (1/N for a mean). With D the classes that are left out the errors are bounded,

    ‖Δ ∂L/∂W_v‖ ≤ ε·s·Σ_n ‖x_n‖  for v in D, else 0,   ‖Δ ∂L/∂x_n‖ ≤ ε·s·Σ_{v in D} ‖W_v‖.      (3)

Reference: Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", arXiv:2411.09009, which keeps ℓ and
leaves out blocks likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchcalc.activations.softcap import softcap
from torchcalc.losses.cross_entropy import shares
from torchcalc.losses.head import Terms, add_product_, even, gradients_of_definition, is_watched, taken, uncap
from torchcalc.native import gpu, row_kernels
from torchcalc.promotion import widen

__all__ = ["ByClasses"]

#: Bytes of logits that are there at a time, unless told otherwise.
MEMORY_CPU, MEMORY_GPU = 64 << 20, 256 << 20


def chunk_of(x: Tensor, memory: int | None) -> int:
    """How many classes at a time: where they are many a multiple of 64, which GPUs multiply best."""
    budget = (MEMORY_GPU if x.is_cuda else MEMORY_CPU) if memory is None else memory
    chunk = budget // (len(x) * x.element_size())
    return chunk // 64 * 64 or max(chunk, 1)


def chunks(
    x: Tensor, w: Tensor, b: Tensor | None, chunk: int, cap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(classes, their logits, capped, and as they came), in memory that the next chunk takes over."""
    room = torch.empty((len(x), min(-(-chunk // 64), -(-len(w) // 64)) * 64), dtype=x.dtype, device=x.device)
    for start in range(0, len(w), chunk):
        here = slice(start, min(start + chunk, len(w)))
        rows = even(w[here])
        whole = room[:, : len(rows)]
        if b is None:
            torch.mm(x, rows.t(), out=whole)
        else:
            torch.addmm(even(b[here]), x, rows.t(), out=whole)
        z = whole[:, : here.stop - start]
        yield here, z if cap is None else softcap(z, cap), z


def log_sum_exp(z: Tensor) -> Tensor:
    """Of each row, in the dtype that is computed in."""
    if gpu.takes(z.device):
        nothing = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        if row_kernels.takes(z, nothing, None):
            top, log_s, _ = row_kernels.cross_entropy(z, nothing, None, -100, "wide", 0.0)[1].statistics
            return top + log_s
    return widen(z).logsumexp(1)


class Samples:
    """What of each sample does not depend on the chunk: its target, its weights q, and Q."""

    def __init__(self, x: Tensor, classes: int, terms: Terms) -> None:
        self.target, self.weight = terms.target, terms.class_weight
        self.counts = self.target != terms.ignore_index
        known = (self.target >= 0) & (self.target < classes)
        wide = widen(x).dtype
        own = torch.ones_like(self.target, dtype=wide)
        if self.weight is not None:
            own = widen(self.weight)[self.target.where(known, 0)]
        self.own = (1 - terms.smoothing) * own  # of q what the target has beside the smoothing
        # A target that is no class gives NaN, and not what lies beside the table.
        self.own = torch.where(self.counts, self.own.where(known, torch.nan), 0)
        self.flat = terms.smoothing / classes  # of q what every class has, times its weight
        total = classes if self.weight is None else widen(self.weight).sum()
        self.total = torch.where(self.counts, self.own + self.flat * total, 0)
        self.z_loss = terms.z_loss

    def weighted_sum(self, z: Tensor, here: slice) -> Tensor:
        """Σ of the chunk's logits times their weights."""
        return (
            z.sum(1, dtype=self.own.dtype) if self.weight is None else z.to(self.own.dtype) @ widen(self.weight[here])
        )


def losses_of(x: Tensor, w: Tensor, b: Tensor | None, terms: Terms, chunk: int) -> tuple[Tensor, Tensor]:
    """(1) of every sample, and ℓ."""
    samples = Samples(x, len(w), terms)
    lse = torch.full((len(x),), -torch.inf, dtype=samples.own.dtype, device=x.device)
    at_target = torch.zeros_like(lse)
    smooth = torch.zeros_like(lse)
    for here, z, _ in chunks(x, w, b, chunk, terms.softcap):
        lse = torch.logaddexp(lse, log_sum_exp(z))
        place = terms.target - here.start
        inside = (place >= 0) & (place < z.shape[1])
        found = z.gather(1, place.clamp(0, z.shape[1] - 1)[:, None])[:, 0].to(lse.dtype)
        at_target = torch.where(inside, found, at_target)
        if samples.flat:
            smooth += samples.weighted_sum(z, here)
    loss = samples.total * lse - samples.own * at_target - samples.flat * smooth + terms.z_loss * lse.square()  # (1)
    return torch.where(samples.counts, loss, 0), lse


def slopes_(
    z: Tensor, lse: Tensor, factor: Tensor, own: Tensor, place: Tensor, flat: Tensor | None, weight: Tensor | None
) -> Tensor:
    """(2) times the share, in the logits' place where a kernel is: factor·e^(z - ℓ) - flat·weight, less own at the target."""
    if gpu.takes(z.device) and flat is None:
        return row_kernels.slopes_(z, lse, factor, own, place)
    wide = widen(z)
    slope = wide.sub_(lse[:, None]) if wide is z else wide - lse[:, None]
    slope = slope.exp_().mul_(factor[:, None])
    slope[factor == 0] = 0  # where 0·∞ is NaN
    if flat is not None:
        slope -= flat[:, None] if weight is None else torch.outer(flat, widen(weight))
    inside = ((place >= 0) & (place < z.shape[1])).nonzero()[:, 0]
    slope[inside, place[inside]] -= own[inside]
    return slope if slope is z else z.copy_(slope)


def gradients(
    x: Tensor, w: Tensor, b: Tensor | None, terms: Terms, lse: Tensor, share: Tensor, needed: Sequence[bool], chunk: int,
    filter_eps: float,
) -> list[Tensor | None]:  # fmt: skip
    """Those of x, w, b that are needed, of Σ share·L."""
    samples = Samples(x, len(w), terms)
    share = share.expand(len(x)).to(lse.dtype)
    factor = share * (samples.total + torch.where(samples.counts, 2 * terms.z_loss * lse, 0))  # (2)
    own, flat = share * samples.own, None
    if samples.flat:
        flat = torch.where(samples.counts, share * samples.flat, 0)
    limit = filter_eps * share.abs().amax()
    need_x, need_w, need_b = needed
    grad_x = torch.empty(x.shape, dtype=lse.dtype, device=x.device) if need_x else None
    grad_w = torch.empty_like(w) if need_w else None
    grad_b = torch.empty_like(b) if need_b and b is not None else None
    for here, z, uncapped in chunks(x, w, b, chunk, terms.softcap):
        weight = None if terms.class_weight is None else terms.class_weight[here]
        g = slopes_(z, lse, factor, own, terms.target - here.start, flat, weight)
        if terms.softcap is not None:
            g = uncap(g, uncapped, terms.softcap)
        if grad_b is not None:
            grad_b[here] = g.sum(0, dtype=lse.dtype).to(grad_b.dtype)
        rows, kept = w[here], None
        if filter_eps:
            kept = (torch.maximum(g.amax(0), -g.amin(0)) > limit).nonzero()[:, 0]  # waits for the device
            if 4 * len(kept) < 3 * len(rows):
                g, rows = g[:, kept], rows[kept]
            else:  # a copy would cost what is saved
                kept = None
        if grad_x is not None:
            add_product_(grad_x, g, rows, first=here.start == 0)
        if grad_w is not None:
            if kept is None:
                torch.mm(g.t(), x, out=grad_w[here])
            else:
                grad_w[here].zero_().index_copy_(0, kept, g.t() @ x)
    return [None if grad_x is None else grad_x.to(x.dtype), grad_w, grad_b]


class ByClasses(torch.autograd.Function):
    """Of plain tensors that kernels take; ``linear_cross_entropy.takes`` says which."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, terms: Terms, dtype: torch.dtype, chunk: int, filter_eps: float
    ) -> Tensor:  # fmt: skip
        target, weight, token_weight, given = terms[:4]
        u, found = shares(x, target, weight, terms.ignore_index, terms.reduction, token_weight, given)
        n = torch.as_tensor(found, device=x.device).double()
        losses, lse = losses_of(x, w, b, terms, chunk)
        ctx.save_for_backward(x, w, b, target, weight, token_weight, lse, n)
        ctx.terms = terms._replace(target=None, class_weight=None, token_weight=None)
        ctx.how = chunk, filter_eps
        return taken(losses, u, n, terms.reduction, dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, target, weight, u, lse, n = ctx.saved_tensors
        terms = ctx.terms._replace(target=target, class_weight=weight, token_weight=u)
        needed = ctx.needs_input_grad[:3]
        if is_watched(g):
            return *gradients_of_definition(g, x, w, b, terms, needed), None, None, None, None
        share = widen(g) if terms.reduction == "none" else g.double() / n
        share = share if u is None else share * u
        return *gradients(x, w, b, terms, lse, share, needed, *ctx.how), None, None, None, None
