"""Binary cross-entropy of logits:  ℓ = -p·t·log σ(x) - (1 - t)·log(1 - σ(x)),  p the weight of the positive class.

Derivation.  With s(x) = log(1 + eˣ) = max(x, 0) + log(1 + e^-|x|), which does not overflow, -log σ(x) = s(-x) and
-log(1 - σ(x)) = s(x), so

    ℓ = p·t·s(-x) + (1 - t)·s(x),   where 0·∞ = 0: a certain and right answer costs nothing.  (1)

s'(x) = σ(x), hence

    ∂ℓ/∂x = (1 - t)·σ(x) - p·t·σ(-x),   for p = 1:  σ(x) - t,                     (2)
    ∂ℓ/∂t = p·s(-x) - s(x),                                                       (3)
    ∂ℓ/∂p = t·s(-x).                                                              (4)

(2) is prediction minus target: where the sigmoid is flat, its vanishing slope has cancelled against that of the
logarithm, so a confident error still learns. The loss is L = reduce(w·ℓ), a mean being over the number of elements.
Saves its arguments.

Reference: Cox 1958, "The regression analysis of binary sequences", doi:10.1111/j.2517-6161.1958.tb00292.x.
"""

from torch import Tensor, nn

from torchcalc.formula import Term, loss, maximum, where
from torchcalc.losses.reduction import resolve

__all__ = ["BCEWithLogitsLoss", "binary_cross_entropy_with_logits"]


def softplus(x: Term) -> Term:
    """s of the derivation."""
    return maximum(x, 0) + (-x.abs()).exp().log1p()


def times(c: Term, s: Term) -> Term:
    """c·s, 0 where c is 0."""
    return where(c == 0, 0, c * s)


def value(x: Term, t: Term) -> Term:
    return times(t, softplus(-x)) + times(1 - t, softplus(x))  # (1)


def slope_x(x: Term, t: Term) -> Term:
    return x.sigmoid() - t  # (2)


def slope_t(x: Term) -> Term:
    return -x  # (3): s(-x) - s(x)


def weighted_value(x: Term, t: Term, p: Term) -> Term:
    return times(p * t, softplus(-x)) + times(1 - t, softplus(x))  # (1)


def weighted_slope_x(x: Term, t: Term, p: Term) -> Term:
    return (1 - t) * x.sigmoid() - p * t * (-x).sigmoid()  # (2)


def weighted_slope_t(x: Term, p: Term) -> Term:
    return times(p, softplus(-x)) - softplus(x)  # (3)


def slope_p(x: Term, t: Term) -> Term:
    return times(t, softplus(-x))  # (4)


_bce = loss("BCEWithLogitsLoss", value, slope_x, slope_t)
_weighted_bce = loss("BCEWithLogitsPosWeightLoss", weighted_value, weighted_slope_x, weighted_slope_t, slope_p)


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
    if weight is not None:
        weight.expand(input.shape)  # raises where it does not fit
    if pos_weight is None:
        return _bce(input, target, weight, reduction, False)
    return _weighted_bce(input, target, pos_weight.expand(input.shape), weight, reduction, False)


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
