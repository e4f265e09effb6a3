"""Cross-entropy of a linear layer's output,  L = CE(X·Wᵀ + b, target),  without its logits.

Of a language model the logits Z = X·Wᵀ + b are the largest tensor by far: tokens times vocabulary. They are not needed as
a whole. The loss is a sum over tokens, L = Σ_n ℓ(z_n), and so are the gradients of the layer (linear.py) and of the loss
(cross_entropy.py): with G = ∂L/∂Z, whose row n depends on z_n alone,

    ∂L/∂X_n = G_n·W,   ∂L/∂W = Σ_n G_nᵀ·X_n,   ∂L/∂b = Σ_n G_n.                   (1)

So a chunk of tokens is enough at a time: its logits are computed, its losses taken, its part of (1) added up, and its
memory, in which G has replaced Z, serves the next chunk. Under sum and mean G is known up to one number, what comes in from
above, before backward begins: forward computes (1) for the number 1, and backward multiplies. What comes in under
``reduction="none"`` is a number for each token, which forward cannot know: there backward computes each chunk again.

Saves X, W and the gradients (1), of those arguments alone that need one. float16 and bfloat16 gradients of W and b are added
up in float32.

What is differentiated again, transformed or traced is cross_entropy(linear(X, W, b), target) itself, with its logits.

Reference: the chain rule; chunks and gradients in forward: Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.casts import cast
from torchcalc.formula.launch import PLAIN
from torchcalc.formula.launched import is_observed
from torchcalc.formula.triton import ELEMENTS
from torchcalc.layers.linear import linear
from torchcalc.losses.cross_entropy import cross_entropy, normalizer
from torchcalc.native import gpu, row_kernels
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import autocasts, widen
from torchcalc.tracing import NotScripted, leaf

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy"]

#: Logits that are there at a time, unless told otherwise: bytes on a CPU; on a GPU samples, which keep its products efficient.
MEMORY = 64 << 20
SAMPLES = 4096


def with_logits(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, class_weight: Tensor | None, *options: Any
) -> Tensor:
    """The definition."""
    ignore_index, reduction, smoothing = options
    logits = linear(x, w, b)
    return cross_entropy(
        logits, target, class_weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
    )


def losses_of(
    z: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, smoothing: float, share: Tensor | None
) -> Tensor | None:
    """The losses of a chunk; z becomes its gradient times the share, one number or one a row. None: no kernel takes it."""
    if z.is_cpu and (rows := kernels.rows()) is not None:
        losses: Tensor | None = rows.cross_entropy_in_place(z, target, class_weight, ignore_index, smoothing, share)
        if losses is not None:
            return losses
    if not row_kernels.takes(z, target, class_weight):
        return None
    losses, kept = row_kernels.cross_entropy(z, target, class_weight, ignore_index, "none", smoothing)
    if share is not None:
        how = "sum" if share.dim() == 0 else "none"
        row_kernels.cross_entropy_gradient(share, z, target, class_weight, kept, ignore_index, how, smoothing, out=z)
    return losses


class LinearCrossEntropyFunction(torch.autograd.Function):
    """By chunks of tokens; of plain tensors that kernels take."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        options: tuple[int, str, float],
        chunk: int,
        dtype: torch.dtype,
        recorded: bool,
    ) -> Tensor:
        ignore_index, reduction, smoothing = ctx.options = options
        ctx.chunk = chunk
        needed = [recorded and need for need in ctx.needs_input_grad[:3]]
        n = torch.as_tensor(normalizer(x, target, class_weight, ignore_index, reduction), device=x.device).double()
        share = None
        if reduction != "none" and any(needed):
            share = (1 / n).to(widen(x).dtype)
        losses, grads = run(x, w, b, target, class_weight, ignore_index, smoothing, chunk, share, needed)
        ctx.save_for_backward(x, w, b, target, class_weight, *grads)
        if reduction == "none":
            return losses.to(dtype)
        return (losses.double().sum() / n).to(dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, target, class_weight, *grads = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        nothing = (None,) * 6
        if torch.is_grad_enabled() or type(g) not in PLAIN or not torch._C._has_storage(g):
            with torch.enable_grad():
                arguments = [a for a, need in zip((x, w, b), needed, strict=True) if need]
                loss = with_logits(x, w, b, target, class_weight, *ctx.options)
            found = iter(torch.autograd.grad(loss, arguments, g, create_graph=torch.is_grad_enabled()))
            return *(next(found) if need else None for need in needed), *nothing
        ignore_index, reduction, smoothing = ctx.options
        if reduction == "none":
            _, grads = run(x, w, b, target, class_weight, ignore_index, smoothing, ctx.chunk, g, needed)
            return *grads, *nothing
        return *(None if grad is None else grad * g for grad in grads), *nothing


def run(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    chunk: int,
    share: Tensor | None,
    needed: list[bool] | tuple[bool, ...],
) -> tuple[Tensor, list[Tensor | None]]:
    """All losses, and the gradients (1) of x, w, b that are needed, for G = share·∂ℓ/∂Z; none without a share."""
    need_x, need_w, need_b = (share is not None and need for need in needed)
    classes, samples, wide = len(w), len(x), widen(x).dtype
    even_w, even_b = even(w), None if b is None else even(b)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    grad_w = torch.empty(even_w.shape, dtype=wide, device=w.device) if need_w else None
    grad_b = torch.zeros(classes, dtype=wide, device=w.device) if need_b else None
    room = torch.empty((min(chunk, samples), len(even_w)), dtype=x.dtype, device=x.device)
    losses = []
    for start in range(0, samples, chunk):
        stop = min(start + chunk, samples)
        here, whole = x[start:stop], room[: stop - start]
        if even_b is None:
            torch.mm(here, even_w.t(), out=whole)
        else:
            torch.addmm(even_b, here, even_w.t(), out=whole)
        z = whole[:, :classes]
        part = share if share is None or share.dim() == 0 else share[start:stop]
        each = losses_of(z, target[start:stop], class_weight, ignore_index, smoothing, part)
        if each is None:  # a target that is no class: the definition says so
            raise IndexError(_no_class(target[start:stop], classes, ignore_index))
        losses.append(each)
        if grad_x is not None:
            torch.mm(whole, even_w, out=grad_x[start:stop])
        if grad_w is not None:
            add_product_(grad_w, whole.t(), here, first=start == 0)
        if grad_b is not None:
            grad_b += z.sum(0, dtype=wide)
    whole = z = room = None  # type: ignore[assignment]  # before memory is taken for what is returned
    grads = [
        None if a is None else a.to(x.dtype) for a in (grad_x, None if grad_w is None else grad_w[:classes], grad_b)
    ]
    return torch.cat(losses), grads


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


def _no_class(target: Tensor, classes: int, ignore_index: int) -> str:
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    return f"Target {wrong[0].item()} is out of bounds."


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
) -> Tensor:
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

    Returns:
        0-d tensor, or for ``"none"`` one of shape ``(N,)``.

    Raises:
        RuntimeError: if shapes do not fit.
        IndexError: if a target is not a class.
        ValueError: if ``memory`` is not positive, or ``reduction`` is unknown.

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
    ways = (-100 if ignore_index is None else ignore_index, reduction, max(float(label_smoothing), 0.0))
    flat = linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten()
    if inner:
        logits = linear(input, *flat).unflatten(-1, linear_weight.shape[:-1])
        return cross_entropy(
            logits, target, weight, ignore_index=ways[0], reduction=reduction, label_smoothing=label_smoothing
        )
    tensors = [a for a in (input, linear_weight, linear_bias, target, weight) if a is not None]
    if autocasts(input) and not torch.compiler.is_compiling():
        low = torch.get_autocast_dtype(input.device.type)
        x, w, b = (a if a is None or a.dtype == torch.float64 else cast(a, low) for a in (input, *flat))
        assert x is not None and w is not None
        if takes(tensors, x, w, b, target, weight, ways):
            with torch.autocast(input.device.type, enabled=False):
                return _chunked(x, w, b, target, weight, ways, memory, widen(x).dtype)
    elif takes(tensors, input, *flat, target, weight, ways):
        return _chunked(input, *flat, target, weight, ways, memory, input.dtype)
    return with_logits(input, *flat, target, weight, *ways)


def takes(
    tensors: list[Tensor],
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ways: tuple[int, str, float],
) -> bool:
    """Whether the chunks' kernels are there for these arguments, and nothing looks on."""
    if torch.compiler.is_compiling() or is_observed() or any(type(a) not in PLAIN for a in tensors):
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
        and ways[1] in kernels.REDUCTIONS
        and ways[2] <= 1
        and (
            class_weight is None
            or (
                class_weight.shape == w.shape[:1]
                and class_weight.is_floating_point()
                and class_weight.device == x.device
                and not class_weight.requires_grad
            )
        )
    )


def _chunked(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ways: tuple[int, str, float],
    memory: int | None,
    dtype: torch.dtype,
) -> Tensor:
    if memory is None and x.is_cuda:
        chunk = SAMPLES
    else:
        chunk = max(1, (MEMORY if memory is None else memory) // (len(w) * x.element_size()))
    recorded = torch.is_grad_enabled()
    class_weight = None if class_weight is None else class_weight.to(x.dtype).contiguous()
    loss: Tensor = LinearCrossEntropyFunction.apply(
        x, w, b, target.contiguous(), class_weight, ways, chunk, dtype, recorded
    )
    return loss


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
    ) -> None:
        """Args: those of ``torch.nn.LinearCrossEntropyLoss``; ``options`` is ignored."""
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        nn.Module.__init__(self)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.num_classes, self.out_features, self.options = num_classes, out_features, options
        outputs = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
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
        )
