"""The mean of a loss over all processes and micro-batches, where they do not have the same number of tokens.

Data-parallel training averages the gradients of W processes: what is minimized is (1/W) Σ_r L_r. With means over each
process's own n_r tokens that is the mean over all tokens only where all n_r are equal. Let every process divide the sum of its
losses by the same number instead:

    L_r = Σ_i ℓ_i / n,   n = Σ_r n_r / W    ⟹    (1/W) Σ_r L_r = Σ_r Σ_i ℓ_i / Σ_r n_r.                    (1)

Over micro-batches n_r counts the tokens of all of them; and where the trainer divides each loss by their number k, as
Lightning does, n is divided by k as well.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["normalizer"]

_kept: deque[Tensor] = deque(maxlen=8)


def all_reduce_(x: Tensor, group: Any = None, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce x over the processes, in place, and keep it for a while.

    The backend's thread lets go of x a moment after the result is there. It must not be the last to: then it takes the
    interpreter's lock, and where the interpreter is just being left that aborts the process.
    """
    dist.all_reduce(x, op, group=group)
    _kept.append(x)
    return x


def normalizer(
    count: int | Tensor,
    *,
    divided_by: int = 1,
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return what every process divides the sum of its losses by, for ``cross_entropy(..., normalizer=)`` and the like.

    Args:
        count: the tokens (samples, or their weights' sum) of this process that count in this optimizer step, ≥ 0, a number
            or a tensor of one: those of all its micro-batches.
        divided_by: what the trainer divides the loss by, ≥ 1: Lightning's ``accumulate_grad_batches``; 1 in a loop that
            only adds up gradients.
        device: where the result is, and the processes talk; None: that of ``count``, or the CPU.
        group: the processes whose gradients are averaged; None: all.

    Returns:
        A float32 tensor of no dimensions, the same on all of them. If no process has a token it is 1: the sums are 0.

    Raises:
        ValueError: ``divided_by`` is not positive.

    Source: (1) above.

    >>> normalizer(12)  # one process: its own mean
    tensor(12.)
    >>> normalizer(12, divided_by=4)
    tensor(3.)
    """
    if divided_by < 1:
        raise ValueError(f"divided_by={divided_by}: must be at least 1")
    if device is None:
        device = count.device if isinstance(count, Tensor) else "cpu"
    n = torch.as_tensor(count, device=device).detach().to(torch.float32).reshape(()).clone()
    world = 1
    if dist.is_available() and dist.is_initialized():
        all_reduce_(n, group)
        world = dist.get_world_size(group)
    return torch.where(n > 0, n / (world * divided_by), torch.ones_like(n))  # (1)
