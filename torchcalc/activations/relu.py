"""ReLU:  y = max(x, 0).

Derivation.  y = x where x > 0 and y = 0 where x < 0. At the kink x = 0 every number in [0, 1] is a subgradient; torch
and we take 0. Since x > 0 exactly where y > 0, the derivative is a function of the output alone:

    y' = 1 where y > 0,  0 where y = 0.                                           (1)

It is applied by selection and not by multiplication, so that an infinite incoming gradient gives 0 and not 0·∞ = NaN.
Where x is NaN so is y, and the gradient passes, as in torch. The map is elementwise: backward and jvp are the same
selection. Saves y; x need not stay alive.

Reference: Nair, Hinton 2010, "Rectified linear units improve restricted Boltzmann machines".
"""

import torch
from torch import Tensor, nn

from torchcalc.activations.inplace import in_place
from torchcalc.formula import Term, pointwise, where
from torchcalc.tracing import NotScripted

__all__ = ["ReLU", "relu"]


def value(x: Term) -> Term:
    return where(x <= 0, 0, x)  # NaN is not ≤ 0 and stays


def slope(y: Term, g: Term) -> Term:
    return where(y <= 0, 0, g)  # (1) times g


_relu = pointwise("ReLU", value, slope, torch_value=torch.relu, whole=True)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0), elementwise, as ``torch.nn.functional.relu``.

    Args:
        input: tensor of any shape and real dtype.
        inplace: if True, the result is written to ``input``, which is returned. Backward reads it there, and raises if
            another operation has changed it since, as torch's.

    Returns:
        Tensor of the same shape and dtype, ≥ 0 or NaN.

    Raises:
        RuntimeError: if ``inplace`` and ``input`` is a leaf that requires a gradient, as torch.

    Reference: Nair, Hinton 2010, "Rectified linear units improve restricted Boltzmann machines".

    >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    >>> y = relu(x)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 0.0, 2.0], [0.0, 0.0, 1.0])
    """
    return in_place(_relu, input) if inplace else _relu(input)


class ReLU(NotScripted, nn.ReLU):
    """Module of :func:`relu`, as ``torch.nn.ReLU``.

    >>> ReLU()(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`relu`; any shape."""
        return relu(input, inplace=self.inplace)
