"""What the ways of computing linear_cross_entropy share: its terms, its definition with logits, and products of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcalc.activations.softcap import softcap
from torchcalc.formula.launch import PLAIN
from torchcalc.layers.linear import linear
from torchcalc.losses.cross_entropy import class_dim, cross_entropy
from torchcalc.promotion import widen


class Terms(NamedTuple):
    """How the loss is taken: the arguments of cross_entropy."""

    target: Any
    class_weight: Tensor | None
    token_weight: Tensor | None
    normalizer: float | Tensor | None
    ignore_index: int
    reduction: str
    smoothing: float
    z_loss: float
    softcap: float | None


class TokenMetrics(NamedTuple):
    """What can be said of each sample beside its loss; without derivatives. All but accuracy have the shape of the target."""

    loss: Tensor  #: ℓ, without token_weight
    log_sum_exp: Tensor  #: log Σ e^z
    entropy: Tensor  #: -Σ p·log p, in nats
    prediction: Tensor  #: the class of the largest logit, int64
    accuracy: Tensor  #: 0-d: the part of the samples, ignored ones apart, whose prediction is their target


def with_logits(
    x: Tensor, w: Tensor, b: Tensor | None, terms: Terms, inner: tuple[int, ...] = (), metrics: bool = False
) -> tuple[Tensor, TokenMetrics | None]:
    """The definition. inner: the sizes of the logits' dimensions after the samples, the classes first; () for (C,)."""
    logits = linear(x, w, b)
    logits = logits.unflatten(-1, inner) if inner else logits

    def loss_of(logits: Tensor, reduction: str, u: Tensor | None, n: float | Tensor | None) -> Tensor:
        return cross_entropy(
            logits,
            terms.target,
            terms.class_weight,
            ignore_index=terms.ignore_index,
            reduction=reduction,
            label_smoothing=terms.smoothing,
            z_loss=terms.z_loss,
            softcap=terms.softcap,
            token_weight=u,
            normalizer=n,
        )

    loss = loss_of(logits, terms.reduction, terms.token_weight, terms.normalizer)
    if not metrics:
        return loss, None
    with torch.no_grad():
        losses = loss_of(logits.detach(), "none", None, None)
        z = logits.detach() if terms.softcap is None else softcap(logits.detach(), terms.softcap)
        return loss, accurate(losses, *look_at(z), terms)


def taken(losses: Tensor, u: Tensor | None, n: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """The loss of the samples' losses: each u times, and with a reduction over n."""
    each = losses if u is None else losses * u
    return each.to(dtype, copy=True) if reduction == "none" else (each.double().sum() / n).to(dtype)


def is_watched(g: Tensor) -> bool:
    """Whether what comes in is differentiated again, or is no plain tensor: then the definition answers."""
    return torch.is_grad_enabled() or type(g) not in PLAIN or not torch._C._has_storage(g)


def gradients_of_definition(
    g: Tensor, x: Tensor, w: Tensor, b: Tensor | None, terms: Terms, needed: Sequence[bool]
) -> list[Tensor | None]:
    """To be differentiated again where grad mode is on."""
    with torch.enable_grad():
        arguments = [a for a, need in zip((x, w, b), needed, strict=True) if need and a is not None]
        loss = with_logits(x, w, b, terms)[0]
    found = iter(torch.autograd.grad(loss, arguments, g, create_graph=torch.is_grad_enabled()))
    return [next(found) if need else None for need in needed]


def look_at(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-sum-exp, the entropy and the largest logit's class of every sample; a few samples at a time."""
    dim = class_dim(z)
    found = []
    for part in z.split(max(1, len(z) // 16)) if dim else [z]:
        wide = widen(part)
        lse = wide.logsumexp(dim, keepdim=True)
        p = (wide - lse).exp()
        entropy = lse.squeeze(dim) - torch.where(p == 0, 0, p * wide).sum(dim)
        found.append((lse.squeeze(dim), entropy, part.argmax(dim)))
    lse, entropy, prediction = (torch.cat(each) if dim else each[0] for each in zip(*found, strict=True))
    return lse, entropy, prediction


def accurate(losses: Tensor, lse: Tensor, entropy: Tensor, prediction: Tensor, terms: Terms) -> TokenMetrics:
    target = terms.target
    classes = target.argmax(class_dim(target)) if target.is_floating_point() else target
    counts = classes != terms.ignore_index
    accuracy = ((prediction == classes) & counts).sum() / counts.sum()
    return TokenMetrics(losses, lse, entropy, prediction, accuracy)


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """On CPU a target that is no class is refused; on a GPU asking would wait for it, and the loss becomes NaN."""
    if target.is_cpu and bool((((target < 0) | (target >= classes)) & (target != ignore_index)).any()):
        raise IndexError(no_class(target, classes, ignore_index))


def no_class(target: Tensor, classes: int, ignore_index: int) -> str:
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    return f"Target {wrong[0].item()} is out of bounds."


def scaled(grad: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """grad·g, rounded once."""
    if grad.dtype == dtype:
        return grad * g
    return torch.mul(grad, g, out=torch.empty(grad.shape, dtype=dtype, device=grad.device))


def uncap(g: Tensor, x: Tensor, cap: float) -> Tensor:
    """From the gradient of softcap(x) that of x."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = softcap(leaf, cap)
    (grad,) = torch.autograd.grad(y, leaf, g)
    return grad


def even(w: Tensor) -> Tensor:
    """On a GPU with more classes, of zeros, up to a multiple of 64: other sizes cuBLAS multiplies at a third of the speed.

    The logits of these classes are zeros, which nothing reads as logits; and so are their gradients.
    """
    if not w.is_cuda or len(w) % 64 == 0:
        return w
    more = w.new_zeros((-len(w) % 64, *w.shape[1:]))
    return torch.cat([w, more])


def add_product_(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a·b, or total = a·b at first; a·b, of a half type, is not rounded to that where torch has such a product."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif total.is_cuda and _widens:
        torch.mm(a, b, out_dtype=total.dtype, out=total) if first else torch.addmm(
            total, a, b, out_dtype=total.dtype, out=total
        )
    else:
        total.copy_(a @ b) if first else total.add_(a @ b)


#: Whether products of half types can be float32, on CUDA.
_widens = "dtype_out" in torch.ops.aten.addmm.overloads() and torch.version.hip is None
