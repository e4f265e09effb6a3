"""What torch does to arguments before a formula sees them, and how a derivative goes back: precision, dtype and shape.

- torch's kernels compute 16-bit floats in float32 and round once. A formula of several operations does the same if it
  starts with :func:`widen` and ends with :func:`like`; otherwise each operation would round.
- An argument that was broadcast to a larger shape is used several times, so its gradient is the sum over these uses:
  :func:`unbroadcast`.
"""

from typing import overload

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

__all__ = ["autocasts", "autocasts_to_float32", "like", "unbroadcast", "widen"]

#: Devices of which torch.is_autocast_enabled() may not be asked. Found out here, since Dynamo before torch 2.13 cannot.
WITHOUT_AUTOCAST = tuple(t for t in ("meta", "lazy", "vulkan") if not torch.amp.is_autocast_available(t))


@overload
def widen(x: Tensor) -> Tensor: ...
@overload
def widen(x: None) -> None: ...
def widen(x: Tensor | None) -> Tensor | None:
    """float16 and bfloat16 as float32; everything else, None too, as it is.

    >>> widen(torch.ones(2, dtype=torch.bfloat16)).dtype, widen(torch.ones(2, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x


def like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in the dtype of its argument x; of a real argument only the real part matters.

    >>> like(torch.tensor(1 + 2j), torch.tensor(3.0))
    tensor(1.)
    """
    if grad.is_complex() and not x.is_complex():
        grad = grad.real
    return grad.to(x.dtype)


def unbroadcast(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of x broadcast to a larger shape: summed over the repeated dimensions.

    >>> unbroadcast(torch.ones(2, 3), torch.zeros(3)), unbroadcast(torch.ones(2, 3), torch.zeros(2, 1)).shape
    (tensor([2., 2., 2.]), torch.Size([2, 1]))
    """
    return like(grad.sum_to_size(x.shape), x)


def autocasts(x: Tensor) -> bool:
    """Whether torch.autocast is on for x's device.

    >>> with torch.autocast("cpu"):
    ...     autocasts(torch.ones(2))
    True
    """
    if not _is_any_autocast_enabled():
        return False
    return x.device.type not in WITHOUT_AUTOCAST and torch.is_autocast_enabled(x.device.type)


def autocasts_to_float32(x: Tensor) -> bool:
    """Whether torch.autocast is on that takes x to float32 in softmax and in powers: on every device but the CPU.

    >>> with torch.autocast("cpu"):
    ...     autocasts_to_float32(torch.ones(2, dtype=torch.bfloat16))
    False
    """
    return (  # in this order: torch.fx traces without autocast, and cannot branch on x
        _is_any_autocast_enabled()
        and x.device.type != "cpu"
        and x.dtype in (torch.bfloat16, torch.float16)
        and autocasts(x)
    )
