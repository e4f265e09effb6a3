"""Natural logarithm:  y = log x,  the inverse of exp.

Derivation.  eʸ = x; differentiated on both sides, eʸ·y' = 1, so

    y' = e⁻ʸ = 1/x.                                                               (1)

The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same quotient, but for complex x, where backward is
that with the conjugate, as torch defines it. Saves x.
"""

import torch
from torch import Tensor, nn

from torchcalc.formula import Term, pointwise
from torchcalc.promotion import autocasts_to_float32
from torchcalc.tracing import NotScripted

__all__ = ["Log", "log"]


def value(x: Term) -> Term:
    return x.log()


def slope(x: Term, g: Term) -> Term:
    return g / x  # (1) times g


_log = pointwise("Log", value, slope, torch_value=torch.log)


def log(input: Tensor) -> Tensor:
    """The natural logarithm, elementwise, as ``torch.log``.

    Args:
        input: tensor of any shape, of float or complex dtype; integers are promoted to the default float dtype.

    Returns:
        Tensor of the same shape and dtype; of real numbers -inf at 0 and NaN below.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> y = log(x)
    >>> y.backward()
    >>> print(f"{y:.4f} {x.grad:.4f}")
    0.6931 0.5000
    """
    return _log(input.float() if autocasts_to_float32(input) else input)


class Log(NotScripted, nn.Module):
    """Module of :func:`log`; torch.nn has none.

    >>> Log()(torch.tensor([1.0, 2.0]))
    tensor([0.0000, 0.6931])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`log`; any shape."""
        return log(input)
