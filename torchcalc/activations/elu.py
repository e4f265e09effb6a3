"""ELU:  y = x where x > 0,  α·(eˣ - 1) elsewhere.          Clevert, Unterthiner, Hochreiter 2016, arXiv:1511.07289

Derivation.  Each branch by itself:

    y' = 1 where x > 0,  α·eˣ elsewhere.                                          (1)

At x = 0 the branches agree for α = 1; for other α there is a kink, where torch and we take α. The map is elementwise,
J = diag(y') = Jᵀ: backward and jvp are the same product. Saves x, since y + α, which is α·eˣ too, cancels for x far
below 0.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc.activations.inplace import in_place
from torchcalc.formula import Term, minimum, pointwise, where
from torchcalc.tracing import NotScripted

__all__ = ["ELU", "elu"]


def value(x: Term, *, alpha: float) -> Term:
    return where(x > 0, x, alpha * x.expm1())


def slope(x: Term, *, alpha: float) -> Term:
    return where(x > 0, 1, alpha * minimum(x, 0).exp())  # (1); of x > 0 it would overflow, and spoil y''


_elu = pointwise("ELU", value, slope, torch_value=F.elu)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """The exponential linear unit, elementwise, as ``torch.nn.functional.elu``.

    Args:
        input: tensor of any shape and float dtype.
        alpha: the limit of the result far below 0 is -alpha.
        inplace: if True, the result is written to ``input``, which is returned; backward keeps a copy of the input.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        RuntimeError: if ``inplace`` and ``input`` is a leaf that requires a gradient, as torch.

    Differs from torch: ``inplace`` with a negative ``alpha`` has a gradient.

    Reference: Clevert, Unterthiner, Hochreiter 2016, arXiv:1511.07289.

    >>> import torch
    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> y = elu(x)
    >>> y.sum().backward()
    >>> print(y.detach(), x.grad)
    tensor([-0.6321,  2.0000]) tensor([0.3679, 1.0000])
    """
    return in_place(_elu, input, alpha) if inplace else _elu(input, alpha)


class ELU(NotScripted, nn.ELU):
    """Module of :func:`elu`, as ``torch.nn.ELU``.

    >>> import torch
    >>> ELU(alpha=2.0)(torch.tensor([-1.0, 2.0]))
    tensor([-1.2642,  2.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`elu`; any shape."""
        return elu(input, self.alpha, self.inplace)
