"""Cross-entropy of a linear layer's output,  L = CE(X·Wᵀ + b, target),  without its logits.

Of a language model the logits Z = X·Wᵀ + b are the largest tensor by far: tokens times vocabulary. They are not needed as
a whole. The loss is a sum over tokens, L = Σ_n ℓ(z_n), and so are the gradients of the layer (linear.py) and of the loss
(cross_entropy.py): with G = ∂L/∂Z, whose row n depends on z_n alone,

    ∂L/∂X_n = G_n·W,   ∂L/∂W = Σ_n G_nᵀ·X_n,   ∂L/∂b = Σ_n G_n.                   (1)

So a chunk of tokens is enough at a time: its logits are computed, its losses taken, its part of (1) added up, and its
memory, in which G has replaced Z, serves the next chunk. Under sum and mean G is known up to one number, what comes in from
above, before backward begins: forward computes (1) for the number 1, and backward multiplies. What comes in under
``reduction="none"`` is a number for each token, which forward cannot know: there backward computes each chunk again.

Saves X, W and the gradients (1), of those arguments alone that need one. Those of float16 and bfloat16 are added up in float32,
multiplied, and rounded once.

What is differentiated again, transformed or traced is cross_entropy(linear(X, W, b), target) itself, with its logits.

Reference: the chain rule; chunks and gradients in forward: Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.activations.softcap import softcap
from torchcalc.casts import lowered
from torchcalc.formula.launch import PLAIN
from torchcalc.formula.launched import is_observed
from torchcalc.formula.triton import ELEMENTS
from torchcalc.losses.by_classes import ByClasses, chunk_of
from torchcalc.losses.cross_entropy import check_normalizer, check_z_loss, shares
from torchcalc.losses.head import (
    Terms,
    accurate,
    add_product_,
    check_targets,
    even,
    gradients_of_definition,
    is_watched,
    look_at,
    no_class,
    scaled,
    taken,
    uncap,
    with_logits,
)
from torchcalc.native import gpu, row_kernels
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import autocasts, widen
from torchcalc.tracing import NotScripted, leaf

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy"]

#: Logits that are there at a time, unless told otherwise: bytes on a CPU; on a GPU samples, which keep its products efficient.
MEMORY = 64 << 20
SAMPLES = 4096


def losses_of(z: Tensor, target: Tensor, terms: Terms, share: Tensor | None) -> Tensor | None:
    """The losses of a chunk; z becomes its gradient times the share, one number or one a row. None: no kernel takes it."""
    weight, ways = terms.class_weight, (terms.smoothing, terms.z_loss)
    if z.is_cpu and (rows := kernels.rows()) is not None:
        losses: Tensor | None = rows.cross_entropy_in_place(z, target, weight, terms.ignore_index, *ways, share)
        if losses is not None:
            return losses
    if not row_kernels.takes(z, target, weight):
        return None
    losses, kept = row_kernels.cross_entropy(z, target, weight, terms.ignore_index, "wide", *ways)
    if share is not None:
        how = "sum" if share.dim() == 0 else "none"
        row_kernels.cross_entropy_gradient(share, z, target, weight, kept, terms.ignore_index, how, *ways, out=z)
    return losses


class LinearCrossEntropyFunction(torch.autograd.Function):
    """By chunks of tokens; of plain tensors that kernels take. Returns the loss, and what TokenMetrics has but accuracy."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        terms: Terms,
        chunk: int,
        dtype: torch.dtype,
        recorded: bool,
        metrics: bool,
    ) -> Any:
        needed = [recorded and need for need in ctx.needs_input_grad[:3]]
        target, weight, token_weight, given = terms[:4]
        u, found = shares(x, target, weight, terms.ignore_index, terms.reduction, token_weight, given)
        n = torch.as_tensor(found, device=x.device).double()
        share = None
        if terms.reduction != "none" and any(needed):
            share = ((1 if u is None else u) / n).to(widen(x).dtype)
        losses, grads, looks = run(x, w, b, terms, chunk, share, needed, metrics)
        ctx.save_for_backward(x, w, b, target, weight, token_weight, *grads)
        ctx.terms, ctx.chunk = terms._replace(target=None, class_weight=None, token_weight=None), chunk
        loss = taken(losses, u, n, terms.reduction, dtype)
        if not metrics:
            return loss
        ctx.mark_non_differentiable(losses, *looks)
        return loss, losses, *looks

    @staticmethod
    def backward(ctx: Any, g: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, target, weight, u, *grads = ctx.saved_tensors
        terms = ctx.terms._replace(target=target, class_weight=weight, token_weight=u)
        needed = ctx.needs_input_grad[:3]
        nothing = (None,) * 5
        if is_watched(g):
            return *gradients_of_definition(g, x, w, b, terms, needed), *nothing
        if terms.reduction == "none":
            share = widen(g) if u is None else widen(g) * u
            grads = [None if a is None else a.to(x.dtype) for a in run(x, w, b, terms, ctx.chunk, share, needed)[1]]
            return *grads, *nothing
        return *(None if grad is None else scaled(grad, g, x.dtype) for grad in grads), *nothing


def run(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    terms: Terms,
    chunk: int,
    share: Tensor | None,
    needed: list[bool] | tuple[bool, ...],
    metrics: bool = False,
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """All losses; the gradients (1) of x, w, b that are needed, for G = share·∂ℓ/∂Z, none without a share; metrics, if wanted."""
    need_x, need_w, need_b = (share is not None and need for need in needed)
    classes, samples, wide = len(w), len(x), widen(x).dtype
    even_w, even_b = even(w), None if b is None else even(b)
    grad_x = torch.empty(x.shape, dtype=wide, device=x.device) if need_x else None
    grad_w = torch.empty(even_w.shape, dtype=wide, device=w.device) if need_w else None
    grad_b = torch.zeros(classes, dtype=wide, device=w.device) if need_b else None
    room = torch.empty((min(chunk, samples), len(even_w)), dtype=x.dtype, device=x.device)
    losses, looks = [], []
    for start in range(0, samples, chunk):
        stop = min(start + chunk, samples)
        here, whole = x[start:stop], room[: stop - start]
        if even_b is None:
            torch.mm(here, even_w.t(), out=whole)
        else:
            torch.addmm(even_b, here, even_w.t(), out=whole)
        uncapped = whole
        if terms.softcap is not None:
            whole = softcap(uncapped, terms.softcap)
        z = whole[:, :classes]
        if metrics:
            looks.append(look_at(z))
        part = share if share is None or share.dim() == 0 else share[start:stop]
        target = terms.target[start:stop]
        each = losses_of(z, target, terms, part)
        if each is None:  # a target that is no class: the definition says so
            raise IndexError(no_class(target, classes, terms.ignore_index))
        if terms.softcap is not None and part is not None:
            whole = uncap(whole, uncapped, terms.softcap)
        losses.append(each)
        if grad_x is not None:
            add_product_(grad_x[start:stop], whole, even_w, first=True)
        if grad_w is not None:
            add_product_(grad_w, whole.t(), here, first=start == 0)
        if grad_b is not None:
            grad_b += z.sum(0, dtype=wide)
    grads = [grad_x, None if grad_w is None else grad_w[:classes], grad_b]
    return torch.cat(losses), grads, [torch.cat(each) for each in zip(*looks, strict=True)]


@leaf
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    memory: int | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    metrics: bool = False,
    recompute: bool = False,
    filter_eps: float = 0.0,
) -> Any:
    """cross_entropy(linear(input, linear_weight, linear_bias), target), as ``torch.nn.functional.linear_cross_entropy``.

    For classes as targets the logits are never there as a whole: they are computed for as many samples at a time as fit in
    ``memory``, forward and backward.

    Args:
        input: ``(N, in_features)`` or ``(in_features,)``, of float dtype.
        linear_weight: ``(C, in_features)``, or ``(C, d₁, ..., in_features)`` for a loss of K dimensions.
        target: classes ``(N,)``, int64, 0 ≤ class < C or ``ignore_index``; or probabilities of the logits' shape.
        linear_bias: ``(C,)``, or ``(C, d₁, ...)``.
        weight: weights of the classes ``(C,)``, ≥ 0.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``.
        ignore_index: the target that contributes nothing; None is -100 for classes.
        label_smoothing: part of each target that is spread evenly over the classes, in [0, 1].
        options: torch's, for its own chunks; taken, and without effect.
        memory: bytes of logits that are there at a time, > 0; a chunk is one sample at least. Fewer save memory, and from
            some hundred samples a chunk downwards cost time. None: 64 MiB on a CPU, 4,096 samples on a GPU.
        z_loss: as of :func:`cross_entropy`, as are the next three.
        softcap: c > 0 of capped logits.
        token_weight: how often each sample counts, of the target's shape.
        normalizer: what a mean divides by.
        metrics: also return :class:`TokenMetrics`: loss, log-sum-exp, entropy and prediction of each sample, and the accuracy.

        recompute: compute the logits in backward again, by chunks of classes: beside the gradients themselves nothing larger than
            ``memory`` and input is there at any time, for one matrix product more. Not with ``metrics``.
        filter_eps: ε ≥ 0, with ``recompute`` alone: classes whose slopes are at most ε in size for every sample are left out of
            backward's products. The error is bounded: ‖Δ gradient of a class's weights‖ ≤ ε·s·Σₙ‖xₙ‖, with s the largest share
            of a sample, 1/N of a mean. 2⁻¹² is below what bfloat16 resolves. The bias's gradient is exact.

    Returns:
        0-d tensor, or for ``"none"`` one of shape ``(N,)``; with ``metrics`` that and the metrics.

    Raises:
        RuntimeError: if shapes do not fit.
        IndexError: if a target is not a class.
        ValueError: if ``memory`` is not positive, ``reduction`` is unknown, ``metrics`` are asked for with ``recompute`` or
            ``filter_eps`` without it, or an argument of cross_entropy is out of its range.

    Differs from torch: derivatives of any order and mode, ``torch.func`` and ``torch.compile`` work; they take the logits.

    Reference: Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989.

    >>> x = torch.tensor([[1.0, 0.0]], requires_grad=True)
    >>> w = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> loss = linear_cross_entropy(x, w, torch.tensor([0]))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}", x.grad)  # (p - y)·W
    0.1269 tensor([[-0.2384,  0.2384]])
    """
    if memory is not None and memory <= 0:
        raise ValueError(f"memory={memory}: bytes for logits, > 0, e.g. 2**26")
    if not filter_eps >= 0 or (filter_eps and not recompute):
        raise ValueError(
            f"filter_eps={filter_eps}: a number ≥ 0, and above 0 only with recompute=True; 2**-12 suits bfloat16"
        )
    if metrics and recompute:
        raise ValueError("metrics=True with recompute=True: their entropies need the logits once more; leave one out")
    if input.dim() not in (1, 2):
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    inner = linear_weight.shape[1:-1]
    if inner and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    if target.shape == (*input.shape[:-1], *linear_weight.shape[:-1]) and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    check_z_loss(z_loss)
    check_normalizer(normalizer, reduction)
    smoothing = max(float(label_smoothing), 0.0)
    terms = Terms(
        target,
        weight,
        token_weight,
        normalizer,
        -100 if ignore_index is None else ignore_index,
        reduction,
        smoothing,
        float(z_loss),
        softcap,
    )
    flat = linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten()
    if not inner:
        if autocasts(input) and not torch.compiler.is_compiling():
            x, w, b = lowered((input, *flat), input.device.type)
            if takes((input, linear_weight, linear_bias), x, w, b, terms):
                with torch.autocast(input.device.type, enabled=False):
                    return _chunked(x, w, b, terms, memory, widen(x).dtype, metrics, recompute, filter_eps)
        elif takes((), input, *flat, terms):
            return _chunked(input, *flat, terms, memory, input.dtype, metrics, recompute, filter_eps)
    loss, found = with_logits(input, *flat, terms, tuple(linear_weight.shape[:-1]) if inner else (), metrics)
    return (loss, found) if metrics else loss


def takes(others: Sequence[Tensor | None], x: Tensor, w: Tensor, b: Tensor | None, terms: Terms) -> bool:
    """Whether the chunks' kernels are there for these arguments, and nothing looks on. others: whose type is to be plain."""
    target, class_weight, u, n = terms[:4]
    given = (*others, x, w, b, target, class_weight, u, n if isinstance(n, Tensor) else None)
    if torch.compiler.is_compiling() or is_observed() or any(a is not None and type(a) not in PLAIN for a in given):
        return False
    layer = [a for a in (x, w, b) if a is not None]
    return (
        x.dim() == 2
        and x.numel() > 0
        and w.numel() > 0
        and (kernels.rows() is not None if x.is_cpu else gpu.takes(x.device))
        and x.dtype in ELEMENTS
        and all(a.dtype == x.dtype and a.device == x.device and a.layout is torch.strided for a in layer)
        and target.dtype == torch.int64
        and target.shape == x.shape[:1]
        and target.device == x.device
        and terms.reduction in kernels.REDUCTIONS
        and terms.smoothing <= 1
        and (class_weight is None or (class_weight.shape == w.shape[:1] and _is_constant(class_weight, x)))
        and (u is None or _is_constant(u, x))
        and not (isinstance(n, Tensor) and n.requires_grad)
    )


def _is_constant(a: Tensor, x: Tensor) -> bool:
    return a.is_floating_point() and a.device == x.device and not a.requires_grad


def _chunked(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    terms: Terms,
    memory: int | None,
    dtype: torch.dtype,
    metrics: bool,
    recompute: bool,
    filter_eps: float,
) -> Any:
    weight = terms.class_weight
    weight = None if weight is None else weight.to(x.dtype).contiguous()
    terms = terms._replace(target=terms.target.contiguous(), class_weight=weight)
    if recompute:
        check_targets(terms.target, len(w), terms.ignore_index)
        return ByClasses.apply(x, w, b, terms, dtype, chunk_of(x, memory), float(filter_eps))
    if memory is None and x.is_cuda:
        chunk = SAMPLES
    else:
        chunk = max(1, (MEMORY if memory is None else memory) // (len(w) * x.element_size()))
    found = LinearCrossEntropyFunction.apply(x, w, b, terms, chunk, dtype, torch.is_grad_enabled(), metrics)
    if not metrics:
        return found
    loss, losses, lse, entropy, prediction = found
    return loss, accurate(losses, lse, entropy, prediction, terms)


_Base: Any = getattr(nn, "LinearCrossEntropyLoss", nn.Module)  # from torch 2.13 on


class LinearCrossEntropyLoss(NotScripted, _Base):
    """Module of :func:`linear_cross_entropy`, as ``torch.nn.LinearCrossEntropyLoss``, with the state_dict's keys of that.

    >>> loss = LinearCrossEntropyLoss(in_features=3, num_classes=5)
    >>> loss(torch.zeros(2, 3), torch.tensor([0, 4]))
    tensor(1.6094, grad_fn=<LinearCrossEntropyFunctionBackward>)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        recompute: bool = False,
        filter_eps: float = 0.0,
    ) -> None:
        """Args: of ``torch.nn.LinearCrossEntropyLoss``, without its ``options``, and of :func:`linear_cross_entropy`."""
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        nn.Module.__init__(self)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.num_classes, self.out_features, self.options = num_classes, out_features, options
        self.z_loss, self.softcap, self.recompute, self.filter_eps = z_loss, softcap, recompute, filter_eps
        outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        metrics: bool = False,
    ) -> Any:
        """Apply :func:`linear_cross_entropy`; ``(N, in_features)`` against ``(N,)``."""
        layer = self.linear
        shape = (self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input,
            layer.weight.reshape(*shape, layer.in_features),
            target,
            linear_bias=None if layer.bias is None else layer.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            token_weight=token_weight,
            normalizer=normalizer,
            metrics=metrics,
            recompute=self.recompute,
            filter_eps=self.filter_eps,
        )
