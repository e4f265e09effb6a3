"""SiLU:  y = x·σ(x),  σ(x) = 1/(1 + e⁻ˣ).           Elfwing, Uchibe, Doya 2018, arXiv:1702.03118

Derivation.  σ' = σ·(1 - σ), see sigmoid.py, so by the product rule

    y' = σ(x) + x·σ(x)·(1 - σ(x)) = σ(x)·(1 + x·(1 - σ(x))).                      (1)

The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product, but for complex x, where backward is
the product with Jᴴ, as torch defines it. Saves x.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc.activations.inplace import in_place
from torchcalc.formula import Term, pointwise
from torchcalc.tracing import NotScripted

__all__ = ["SiLU", "silu"]


def value(x: Term) -> Term:
    return x * x.sigmoid()


def slope(x: Term) -> Term:
    s = x.sigmoid()
    return s * (1 + x * (1 - s))  # (1)


_silu = pointwise("SiLU", value, slope, torch_value=F.silu, whole=True)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """The sigmoid linear unit input·σ(input), also called swish, elementwise, as ``torch.nn.functional.silu``.

    Args:
        input: tensor of any shape, of float or complex dtype.
        inplace: if True, the result is written to ``input``, which is returned; backward keeps a copy of the input.

    Returns:
        Tensor of the same shape and dtype, ≥ -0.279 if real.

    Raises:
        RuntimeError: if ``inplace`` and ``input`` is a leaf that requires a gradient, as torch.

    Reference: Elfwing, Uchibe, Doya 2018, arXiv:1702.03118.

    >>> import torch
    >>> x = torch.tensor(0.0, requires_grad=True)
    >>> y = silu(x)
    >>> y.backward()
    >>> y.item(), x.grad.item()
    (0.0, 0.5)
    """
    return in_place(_silu, input) if inplace else _silu(input)


class SiLU(NotScripted, nn.SiLU):
    """Module of :func:`silu`, as ``torch.nn.SiLU``.

    >>> import torch
    >>> SiLU()(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7311])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`silu`; any shape."""
        return silu(input, inplace=self.inplace)
