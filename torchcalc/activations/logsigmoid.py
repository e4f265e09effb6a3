"""Log-sigmoid:  y = log σ(x) = -log(1 + e⁻ˣ).

Derivation.  -log(1 + e⁻ˣ) = min(x, 0) - log(1 + e^-|x|), which does not overflow. By the chain rule and with
σ' = σ·(1 - σ), see sigmoid.py,

    y' = σ'(x)/σ(x) = 1 - σ(x) = σ(-x).                                           (1)

The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product. Saves x: 1 - eʸ would cancel for large x.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc.formula import Term, minimum, pointwise
from torchcalc.tracing import NotScripted

__all__ = ["LogSigmoid", "logsigmoid"]


def value(x: Term) -> Term:
    return minimum(x, 0) - (-x.abs()).exp().log1p()


def slope(x: Term) -> Term:
    return (-x).sigmoid()  # (1)


_logsigmoid = pointwise("LogSigmoid", value, slope, torch_value=F.logsigmoid)


def logsigmoid(input: Tensor) -> Tensor:
    """log(1/(1 + exp(-input))), elementwise, as ``torch.nn.functional.logsigmoid``.

    Args:
        input: tensor of any shape and float dtype.

    Returns:
        Tensor of the same shape and dtype, ≤ 0.

    >>> import torch
    >>> x = torch.tensor(0.0, requires_grad=True)
    >>> y = logsigmoid(x)
    >>> y.backward()
    >>> print(f"{y:.4f} {x.grad:.4f}")
    -0.6931 0.5000
    """
    return _logsigmoid(input)


class LogSigmoid(NotScripted, nn.LogSigmoid):
    """Module of :func:`logsigmoid`, as ``torch.nn.LogSigmoid``.

    >>> import torch
    >>> LogSigmoid()(torch.tensor([0.0, -100.0]))
    tensor([  -0.6931, -100.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`logsigmoid`; any shape."""
        return logsigmoid(input)
