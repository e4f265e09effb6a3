"""Softplus:  y = log(1 + e^βx)/β.                   Dugas, Bengio, Bélisle, Nadeau, Garcia 2001

Derivation.  With z = βx, log(1 + eᶻ) = max(z, 0) + log(1 + e^-|z|), which does not overflow. By the chain rule

    y' = (1/β)·β·eᶻ/(1 + eᶻ) = σ(βx).                                             (1)

Where z exceeds the threshold y is x itself, as in torch, and y' = 1: for thresholds of 37 and more that is the same
number in double precision. The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product. Saves x.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc.formula import Term, maximum, pointwise, where
from torchcalc.promotion import autocasts_to_float32
from torchcalc.tracing import NotScripted

__all__ = ["Softplus", "softplus"]


def log_1p_exp(z: Term) -> Term:
    """log(1 + eᶻ)."""
    return log_1p_exp_of_both(z)[0]


def log_1p_exp_of_both(z: Term) -> tuple[Term, Term]:
    """log(1 + eᶻ) and log(1 + e⁻ᶻ), which share the logarithm."""
    # Not -|z|, whose derivative torch takes to be 0 at 0; that of maximum is 1 there.
    rest = where(z >= 0, -z, z).exp().log1p()
    return maximum(z, 0) + rest, where(z >= 0, 0, -z) + rest


def value(x: Term, *, beta: float, threshold: float) -> Term:
    z = x * beta
    return where(z > threshold, x, log_1p_exp(z) / beta)


def slope(x: Term, *, beta: float, threshold: float) -> Term:
    z = x * beta
    return where(z > threshold, 1, z.sigmoid())  # (1)


def torch_value(x: Tensor, beta: float, threshold: float) -> Tensor:
    return F.softplus(x, beta, min(threshold, 80))  # from there on y = x in every precision, and torch's eᶻ overflows


_softplus = pointwise("Softplus", value, slope, torch_value=torch_value)


def softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta·input))/beta, a smooth rectifier, elementwise, as ``torch.nn.functional.softplus``.

    Args:
        input: tensor of any shape and float dtype.
        beta: sharpness of the bend, ≠ 0.
        threshold: where beta·input exceeds it, the result is input itself.

    Returns:
        Tensor of the same shape and dtype.

    Reference: Dugas et al. 2001, "Incorporating second-order functional knowledge for better option pricing".

    >>> import torch
    >>> x = torch.tensor(0.0, requires_grad=True)
    >>> y = softplus(x)
    >>> y.backward()
    >>> print(f"{y:.4f} {x.grad:.4f}")
    0.6931 0.5000
    """
    return _softplus(input.float() if autocasts_to_float32(input) else input, beta, threshold)


class Softplus(NotScripted, nn.Softplus):
    """Module of :func:`softplus`, as ``torch.nn.Softplus``.

    >>> import torch
    >>> Softplus()(torch.tensor([0.0, 30.0]))
    tensor([ 0.6931, 30.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`softplus`; any shape."""
        return softplus(input, self.beta, self.threshold)
