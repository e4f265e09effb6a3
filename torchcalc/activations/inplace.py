"""The ``inplace`` argument of activations: the result is written over the input, and backward stays right."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["in_place"]


def in_place(function: Callable[..., Tensor], input: Tensor, *numbers: Any) -> Tensor:
    """Write function(input, *numbers) over input and return it.

    Where gradients are recorded, the function gets a copy: what it keeps for backward must not be overwritten.

    Raises:
        RuntimeError: if ``input`` is a leaf that requires a gradient, as torch.

    >>> x = torch.tensor([1.0, -1.0])
    >>> in_place(torch.abs, x) is x, x
    (True, tensor([1., 1.]))
    """
    return input.copy_(function(input.clone() if torch.is_grad_enabled() else input, *numbers))
