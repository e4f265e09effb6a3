"""Dropout:  y = x·k/(1 - p),  each k by itself 0 with probability p, and else 1.

Derivation.  E[y] = x, which is why 1 - p divides. Given k the map is linear and elementwise:

    ∂L/∂x = ∂L/∂y·k/(1 - p),                                                      (1)

and forward mode is the same product. Saves k, a byte an element; torch on CPU keeps k/(1 - p), a number of x's dtype.

k is drawn as torch draws it: for the same seed the same elements are dropped, on CPU and on CUDA. float16 and bfloat16 are
computed in float32 and rounded once; torch on CPU rounds 1/(1 - p) to x's dtype first.

Reference: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc import native
from torchcalc.autograd import Function
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import like, widen
from torchcalc.tracing import NotScripted, leaf

__all__ = ["Dropout", "dropout"]


def kept(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x·k/(1 - p), rounded once."""
    wide = widen(x)
    return like(wide * (keep.to(wide.dtype) / (1 - p)), x)  # (1)


class DropoutFunction(Function):
    @staticmethod
    def forward(x: Tensor, keep: Tensor, p: float) -> Tensor:
        return kept(x, keep, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, keep, ctx.p = inputs
        ctx.save_for_backward(keep)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return kept(g, keep, ctx.p), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: Any) -> Tensor:
        (keep,) = ctx.saved_tensors
        return kept(dx, keep, ctx.p)


@leaf
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """input with each element 0 at probability p, and divided by 1 - p else, as ``torch.nn.functional.dropout``.

    Args:
        input: tensor of any shape and float dtype.
        p: in [0, 1]; of 1 all are 0.
        training: if False, input is returned as it is.
        inplace: if True, the result is also written to ``input``, which is returned.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ValueError: if p is not in [0, 1].

    Reference: Srivastava et al. 2014.

    >>> sorted(set(dropout(torch.ones(100), p=0.5).tolist()))
    [0.0, 2.0]
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p in (0, 1) or torch.compiler.is_compiling() or not input.is_floating_point() or input.is_nested:
        return F.dropout(input, p, training, inplace)
    y: Tensor | None = None
    if (nodes := kernels.rows()) is None:
        native.warn_once((input,), nodes=True)
    else:
        y = nodes.dropout(input, p)
    if y is None:
        keep = torch.empty_like(input, dtype=torch.bool, requires_grad=False).bernoulli_(1 - p)
        y = DropoutFunction.apply(input, keep, float(p))
    return input.copy_(y) if inplace else y


class Dropout(NotScripted, nn.Dropout):
    """Module of :func:`dropout`, as ``torch.nn.Dropout``.

    >>> Dropout(0.1)
    Dropout(p=0.1, inplace=False)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`dropout` in training mode; any shape."""
        return dropout(input, self.p, self.training, self.inplace)
