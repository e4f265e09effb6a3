"""Binary cross-entropy of logits:  ℓ = -p·t·log σ(x) - (1 - t)·log(1 - σ(x)),  p the weight of the positive class.

Derivation.  log(1 - σ(x)) = log σ(x) - x, so that with s = -log σ(x) = log(1 + e⁻ˣ), which does not overflow,

    ℓ = (1 - t)·x + c·s,   c = 1 + (p - 1)·t.                                     (1)

s' = -σ(-x) = σ(x) - 1, hence ∂ℓ/∂x = (1 - t) + c·σ(x) - c, that is

    ∂ℓ/∂x = c·σ(x) - p·t,   for p = 1:  σ(x) - t,                                 (2)
    ∂ℓ/∂t = (p - 1)·s - x,                                                        (3)
    ∂ℓ/∂p = t·s.                                                                  (4)

(2) is prediction minus target: where the sigmoid is flat, its vanishing slope has cancelled against that of the
logarithm, so a confident error still learns. The loss is L = reduce(w·ℓ), a mean being over the number of elements.
Saves its arguments.

Reference: Cox 1958, "The regression analysis of binary sequences", doi:10.1111/j.2517-6161.1958.tb00292.x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import _reduction

from torchcalc.autograd import Function
from torchcalc.losses.reduction import per_element, reduce, resolve
from torchcalc.promotion import like, unbroadcast, widen

__all__ = ["BCEWithLogitsLoss", "binary_cross_entropy_with_logits"]


def value(x: Tensor, t: Tensor, p: Tensor | int) -> Tensor:
    return (1 - t) * x - (1 + (p - 1) * t) * F.logsigmoid(x)  # (1)


def slope_x(x: Tensor, t: Tensor, p: Tensor | int) -> Tensor:
    return (1 + (p - 1) * t) * torch.sigmoid(x) - p * t  # (2)


def slope_t(x: Tensor, p: Tensor | int) -> Tensor:
    return (1 - p) * F.logsigmoid(x) - x  # (3)


def slope_p(x: Tensor, t: Tensor) -> Tensor:
    return -t * F.logsigmoid(x)  # (4)


class BCEWithLogitsFunction(Function):
    autocast = "float32"

    @staticmethod
    def forward(x: Tensor, t: Tensor, w: Tensor | None, p: Tensor | None, reduction: str) -> Tensor:
        enum = _reduction.get_enum(reduction)
        loss = torch.binary_cross_entropy_with_logits(widen(x), widen(t), widen(w), widen(p), enum)
        return like(loss, t)  # torch computes in place in a tensor of the dtype of 1 - t

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.reduction = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, t, w, p = ctx.saved_tensors
        X, T, W, P = widen(x), widen(t), 1 if w is None else widen(w), 1 if p is None else widen(p)
        need_x, need_t, need_w, need_p, _ = ctx.needs_input_grad
        g = per_element(widen(grad_output), ctx.reduction, x.numel())
        return (
            like(g * W * slope_x(X, T, P), x) if need_x else None,
            like(g * W * slope_t(X, P), t) if need_t else None,
            unbroadcast(g * value(X, T, P), w) if need_w else None,
            unbroadcast(g * W * slope_p(X, T), p) if need_p else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dt: Tensor, dw: Tensor | None, dp: Tensor | None, _: None) -> Tensor:
        x, t, w, p = ctx.saved_tensors
        X, T, W, P = widen(x), widen(t), 1 if w is None else widen(w), 1 if p is None else widen(p)
        change = W * (slope_x(X, T, P) * dx + slope_t(X, P) * dt)
        if dp is not None:
            change = change + W * slope_p(X, T) * dp
        if dw is not None:
            change = change + value(X, T, P) * dw
        return like(reduce(change, ctx.reduction), t)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """The binary cross-entropy of σ(input), as ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Args:
        input: logits, tensor of any shape and float dtype.
        target: probabilities of the positive class, in [0, 1], of the same shape; gets a gradient too if it needs one.
        weight: weights of the losses, ≥ 0, broadcast to the shape of input.
        size_average: deprecated, as in torch.
        reduce: deprecated, as in torch.
        reduction: ``"none"`` for the losses of the elements, ``"sum"``, or ``"mean"``, over the number of elements.
        pos_weight: weight of the positive class, ≥ 0, broadcast to the shape of input: > 1 for recall, < 1 for
            precision.

    Returns:
        0-d tensor, or for ``"none"`` one of the shape of input.

    Raises:
        ValueError: if ``reduction`` is unknown or input and target differ in size.
        RuntimeError: if ``weight`` or ``pos_weight`` does not broadcast.

    Differs from torch: ``weight`` and ``pos_weight`` may need a gradient; float16 and bfloat16 are computed in float32
    and rounded once.

    Reference: Cox 1958, doi:10.1111/j.2517-6161.1958.tb00292.x.

    >>> logit = torch.tensor([0.0], requires_grad=True)
    >>> loss = binary_cross_entropy_with_logits(logit, torch.ones(1))
    >>> loss.backward()
    >>> print(f"{loss.item():.4f}", logit.grad)
    0.6931 tensor([-0.5000])
    """
    reduction = resolve(reduction, size_average, reduce)
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    return BCEWithLogitsFunction.apply(input, target, weight, pos_weight, reduction)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """Module of :func:`binary_cross_entropy_with_logits`, as ``torch.nn.BCEWithLogitsLoss``.

    >>> BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))(torch.zeros(1), torch.ones(1))
    tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Apply :func:`binary_cross_entropy_with_logits`; input and target of one shape."""
        return binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )
