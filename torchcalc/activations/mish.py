"""Mish:  y = x·tanh(s(x)),  s(x) = log(1 + eˣ).                               Misra 2019, arXiv:1908.08681

Derivation.  With e = eˣ, tanh(log(1 + e)) = ((1 + e)² - 1)/((1 + e)² + 1). Numerator and denominator times e⁻²ˣ where
x ≥ 0 leave one exponential, which does not overflow: with z = e^-|x|,

    n = 1 + 2z where x ≥ 0,  z·(2 + z) elsewhere,
    b = z² where x ≥ 0,      1 elsewhere,          tanh(s(x)) = n/(n + 2b).       (1)

s' = σ(x) and tanh' = 1 - tanh², so y' = tanh(s) + x·σ(x)·(1 - tanh²(s)). Both forms of (1) have n + b = (1 + z)², so
1 - tanh² = ((n + 2b)² - n²)/(n + 2b)² = 4b·(1 + z)²/(n + 2b)², without cancellation. With σ(x) = a/(1 + z), a = 1
where x ≥ 0 and z elsewhere,

    y' = n/(n + 2b) + 4x·a·b·(1 + z)/(n + 2b)².                                   (2)

The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product. Saves x.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc.activations.inplace import in_place
from torchcalc.formula import Term, pointwise, where
from torchcalc.tracing import NotScripted

__all__ = ["Mish", "mish"]


def parts(x: Term) -> tuple[Term, Term, Term]:
    """z, n and b of the derivation."""
    z = where(x >= 0, -x, x).exp()  # not -|x|, whose derivative torch takes to be 0 at 0
    return z, where(x >= 0, 1 + 2 * z, z * (2 + z)), where(x >= 0, z * z, 1)


def value(x: Term) -> Term:
    _, n, b = parts(x)
    return x * (n / (n + 2 * b))  # (1)


def slope(x: Term) -> Term:
    z, n, b = parts(x)
    inverse = 1 / (n + 2 * b)
    a = where(x >= 0, 1, z)
    return inverse * (n + 4 * x * (a * b * (1 + z) * inverse))  # (2)


_mish = pointwise("Mish", value, slope, torch_value=F.mish)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """input·tanh(log(1 + exp(input))), elementwise, as ``torch.nn.functional.mish``.

    Args:
        input: tensor of any shape and float dtype.
        inplace: if True, the result is written to ``input``, which is returned; backward keeps a copy of the input.

    Returns:
        Tensor of the same shape and dtype, ≥ -0.309.

    Raises:
        RuntimeError: if ``inplace`` and ``input`` is a leaf that requires a gradient, as torch.

    Reference: Misra 2019, arXiv:1908.08681.

    >>> import torch
    >>> x = torch.tensor(0.0, requires_grad=True)
    >>> y = mish(x)
    >>> y.backward()
    >>> print(y.item(), f"{x.grad:.4f}")
    0.0 0.6000
    """
    return in_place(_mish, input) if inplace else _mish(input)


class Mish(NotScripted, nn.Mish):
    """Module of :func:`mish`, as ``torch.nn.Mish``.

    >>> import torch
    >>> Mish()(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8651])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`mish`; any shape."""
        return mish(input, inplace=self.inplace)
