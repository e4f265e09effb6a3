"""The ``inplace`` argument of activations: the result is written over the input, and backward stays right.

Where backward reads the input, a copy of it is kept, as torch's operations do. Where it reads the result, this is what the
input's memory holds now: torch refuses backward if it is changed later.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcalc.native import pointwise as kernels

__all__ = ["in_place"]


def in_place(function: Callable[..., Tensor], input: Tensor, *numbers: Any) -> Tensor:
    """Write function(input, *numbers) over input and return it.

    By the formula's kernel where there is one. Elsewhere the function gets a copy where gradients are recorded, since what it
    keeps for backward must not be overwritten.

    Raises:
        RuntimeError: if ``input`` is a leaf that requires a gradient, as torch.

    >>> x = torch.tensor([1.0, -1.0])
    >>> in_place(torch.abs, x) is x, x
    (True, tensor([1., 1.]))
    """
    formula = getattr(function, "formula", None)
    if formula is not None and not torch.compiler.is_compiling() and (place := kernels.index(formula)) >= 0:
        y: Tensor | None = kernels.in_place(place, input, *numbers)
        if y is not None:
            return y
    return input.copy_(function(input.clone() if torch.is_grad_enabled() else input, *numbers))
