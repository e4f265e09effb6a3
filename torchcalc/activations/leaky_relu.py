"""Leaky ReLU:  y = x where x > 0,  a·x elsewhere.            Maas, Hannun, Ng 2013

Derivation.  Each branch by itself:

    y' = 1 where x > 0,  a elsewhere.                                             (1)

At the kink x = 0 torch and we take a. The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product.
Saves x; in place the result, which takes its memory, where a ≥ 0.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc.activations.inplace import in_place
from torchcalc.formula import Term, pointwise, where
from torchcalc.tracing import NotScripted

__all__ = ["LeakyReLU", "leaky_relu"]


def value(x: Term, *, negative_slope: float) -> Term:
    return where(x > 0, x, x * negative_slope)


def slope(x: Term, g: Term, *, negative_slope: float) -> Term:
    return where(x > 0, g, g * negative_slope)  # (1) times g


def slope_by_result(y: Term, g: Term, *, negative_slope: float) -> Term:
    return where(y > 0, g, g * negative_slope)  # for a ≥ 0 y > 0 exactly where x > 0


_leaky_relu = pointwise("LeakyReLU", value, slope, torch_value=F.leaky_relu)
_leaky_relu_in_place = pointwise("LeakyReLUInPlace", value, slope_by_result, torch_value=F.leaky_relu)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """input where it is positive, negative_slope·input elsewhere, as ``torch.nn.functional.leaky_relu``.

    Args:
        input: tensor of any shape and float dtype.
        negative_slope: the slope below 0.
        inplace: if True, the result is written to ``input``, which is returned. Backward reads it there, and raises if
            another operation has changed it since, as torch's; with a negative slope it keeps a copy of the input.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        RuntimeError: if ``inplace`` and ``input`` is a leaf that requires a gradient, as torch.

    Differs from torch: ``inplace`` with a negative ``negative_slope`` has a gradient.

    Reference: Maas, Hannun, Ng 2013, "Rectifier nonlinearities improve neural network acoustic models".

    >>> import torch
    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> y = leaky_relu(x, 0.25)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([-0.25, 2.0], [0.25, 1.0])
    """
    if not inplace:
        return _leaky_relu(input, negative_slope)
    return in_place(_leaky_relu_in_place if negative_slope >= 0 else _leaky_relu, input, negative_slope)


class LeakyReLU(NotScripted, nn.LeakyReLU):
    """Module of :func:`leaky_relu`, as ``torch.nn.LeakyReLU``.

    >>> import torch
    >>> LeakyReLU(0.25)(torch.tensor([-1.0, 2.0]))
    tensor([-0.2500,  2.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`leaky_relu`; any shape."""
        return leaky_relu(input, self.negative_slope, self.inplace)
