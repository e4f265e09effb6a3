"""Linear:  Y = X·Wᵀ + b,  rows of X are samples.

Derivation.  Y_ni = Σⱼ X_nj·W_ij + b_i. With G = ∂L/∂Y, the chain rule sums over everything that an entry takes part in:

    ∂L/∂X_nj = Σᵢ G_ni·W_ij   →   ∂L/∂X = G·W                                     (1)
    ∂L/∂W_ij = Σₙ G_ni·X_nj   →   ∂L/∂W = Gᵀ·X                                    (2)
    ∂L/∂b_i  = Σₙ G_ni                                                            (3)

where n runs over all leading dimensions. The map is linear in X, in W and in b, so its differential is

    dY = dX·Wᵀ + X·dWᵀ + db.                                                      (4)

Of complex arguments backward takes the conjugate, as torch defines it. Saves X if W needs a gradient, and W if X does.

Reference: Rumelhart, Hinton, Williams 1986, doi:10.1038/323533a0.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc import native
from torchcalc.autograd import Function
from torchcalc.casts import lowered
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import autocasts, unbroadcast
from torchcalc.tracing import NotScripted, leaf

__all__ = ["Linear", "linear"]


def samples(x: Tensor) -> Tensor:
    """All leading dimensions as one, those of a nested tensor too."""
    if x.is_nested:
        return torch.cat([samples(part) for part in x.unbind()])
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ·b̄, where b may be sparse: torch multiplies a sparse matrix from its left only."""
    return a.mT @ b.conj() if b.layout == torch.strided else (b.conj().transpose(0, 1) @ a).mT


class LinearFunction(Function):
    autocast = "lower_precision"

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, w, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b = ctx.saved_tensors
        need_x, need_w, need_b, *_ = ctx.needs_input_grad
        G = (
            g if w.dim() == 2 else g.unsqueeze(-1)
        )  # a weight vector is a matrix of one row; its output has no dimension
        grad_x = G @ torch.atleast_2d(w).conj() if need_x else None  # (1)
        grad_w = product(samples(G), samples(x)).view(w.shape) if need_w else None  # (2)
        grad_b = unbroadcast(samples(g) if g.is_nested else g, b) if need_b else None  # (3)
        return grad_x, grad_w, grad_b

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dw: Tensor, db: Tensor | None) -> Tensor:
        x, w, _ = ctx.saved_tensors
        dy = F.linear(dx, w) + F.linear(x, dw)  # (4)
        return dy if db is None else dy + db


@leaf
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The affine map input·weightᵀ + bias, as ``torch.nn.functional.linear``.

    Args:
        input: ``(*, in_features)``, float or complex, any number of leading dimensions, none too; nested as well, or a
            sparse matrix.
        weight: ``(out_features, in_features)`` or ``(in_features)``, of the same dtype.
        bias: ``(out_features)`` or what broadcasts to the result; None for a linear map.

    Returns:
        ``(*, out_features)``, or ``(*)`` if weight has one dimension.

    Raises:
        RuntimeError: if the shapes or dtypes do not fit, as torch.

    Reference: Rumelhart, Hinton, Williams 1986, doi:10.1038/323533a0.

    >>> x, w = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> y = linear(x, w)
    >>> y.backward()
    >>> y, w.grad
    (tensor([11.], grad_fn=<LinearFunctionBackward>), tensor([[1., 2.]]))
    """
    if not torch.compiler.is_compiling():
        if (rows := kernels.rows()) is None:
            native.warn_once((input,), nodes=True)
        else:
            given = lowered((input, weight, bias), input.device.type) if autocasts(input) else (input, weight, bias)
            y: Tensor | None = rows.linear(*given)
            if y is not None:
                return y
    if input.is_nested and input.layout == torch.strided:  # which no Function of Python may return
        return torch.nested.as_nested_tensor([linear(part, weight, bias) for part in input.unbind()])
    return LinearFunction.apply(input, weight, bias)


class Linear(NotScripted, nn.Linear):
    """Module of :func:`linear`: parameters, initialisation and ``state_dict`` of ``torch.nn.Linear``.

    >>> Linear(2, 3)
    Linear(in_features=2, out_features=3, bias=True)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`linear` to ``(*, in_features)``."""
        return linear(input, self.weight, self.bias)
