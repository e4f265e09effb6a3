"""Oracles for the kernels: torch.optim's loop with correctly rounded roots, the textbook in float64, and Philox in NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def exact_sqrt(x: Tensor) -> Tensor:
    # torch.sqrt is MKL's, which on AMD is off by one ulp in every fifth float32. Rounding a float64 root to float32 is exact.
    return torch.from_numpy(np.asarray(np.sqrt(x.double().numpy()))).to(x.dtype)


def loop_adam(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, x: Tensor | None, step: float, *, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, decoupled: bool, maximize: bool = False,
) -> None:  # fmt: skip
    """torch.optim._single_tensor_adam, operation by operation, on contiguous tensors; `step` counts this step."""
    if maximize:
        g = -g
    if weight_decay != 0 and decoupled:
        p.mul_(1 - lr * weight_decay)
    elif weight_decay != 0:
        g = g.add(p, alpha=weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if x is not None:
        torch.maximum(x, v, out=x)
    root = exact_sqrt(v if x is None else x)
    denominator = (root / (1 - beta2**step) ** 0.5).add_(eps)
    p.addcdiv_(m, denominator, value=-(lr / (1 - beta1**step)))


def loop_sgd(
    p: Tensor, g: Tensor, b: Tensor | None, first: bool, *, lr: float, momentum: float, dampening: float,
    weight_decay: float, nesterov: bool, maximize: bool = False,
) -> None:  # fmt: skip
    """torch.optim._single_tensor_sgd, operation by operation."""
    if maximize:
        g = -g
    if weight_decay != 0:
        g = g.add(p, alpha=weight_decay)
    if b is not None:
        if first:
            b.copy_(g)
        else:
            b.mul_(momentum).add_(g, alpha=1 - dampening)
        g = g.add(b, alpha=momentum) if nesterov else b
    p.add_(g, alpha=-lr)


def textbook_adam(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, x: Tensor | None, step: float, *, lr: float, beta1: float, beta2: float,
    eps: float, weight_decay: float, decoupled: bool, maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Kingma & Ba's algorithm 1 (Loshchilov & Hutter's algorithm 2) in float64, written as in the papers."""
    p, g, m, v = p.double(), g.double(), m.double(), v.double()
    if maximize:
        g = -g
    if not decoupled:
        g = g + weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    x = None if x is None else torch.maximum(x.double(), v)
    m_hat = m / (1 - beta1**step)
    v_hat = (v if x is None else x) / (1 - beta2**step)
    decay = lr * weight_decay * p if decoupled else 0.0
    return p - decay - lr * m_hat / (v_hat.sqrt() + eps), m, v, x


def textbook_sgd(
    p: Tensor, g: Tensor, b: Tensor | None, first: bool, *, lr: float, momentum: float, dampening: float,
    weight_decay: float, nesterov: bool, maximize: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The algorithm in torch.optim.SGD's documentation, in float64."""
    p, g = p.double(), g.double()
    if maximize:
        g = -g
    g = g + weight_decay * p
    if b is not None:
        b = g if first else momentum * b.double() + (1 - dampening) * g
        g = g + momentum * b if nesterov else b
    return p - lr * g, b


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from |x| to the next number of `dtype`, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.double().abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


def philox(counter: np.ndarray, stream: int, seed: int) -> np.ndarray:
    """Philox-4x32-10 (Salmon et al. 2011): for each 64-bit counter the four output words; shape (n, 4)."""
    mask = np.uint64(0xFFFFFFFF)
    word = [
        counter.astype(np.uint64) & mask,
        counter.astype(np.uint64) >> np.uint64(32),
        np.full(counter.shape, stream & 0xFFFFFFFF, np.uint64),
        np.full(counter.shape, stream >> 32, np.uint64),
    ]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        a, b = word[0] * np.uint64(0xD2511F53), word[2] * np.uint64(0xCD9E8D57)
        word = [(b >> np.uint64(32)) ^ word[1] ^ key[0], b & mask, (a >> np.uint64(32)) ^ word[3] ^ key[1], a & mask]
        key = [(key[0] + np.uint64(0x9E3779B9)) & mask, (key[1] + np.uint64(0xBB67AE85)) & mask]
    return np.stack(word, axis=-1).astype(np.uint32)


def random_bits(n: int, stream: int, seed: int, dtype: torch.dtype) -> np.ndarray:
    """The bits that a kernel rounds elements 0 .. n-1 of tensor number `stream` with.

    Units of 128 elements are 64 pairs of neighbours, pair 16·w + l at word w of counter l of the unit. For bfloat16 the two
    share that word, lower half first; for float16 the second has its own, 16 counters later.
    """
    units = -(-n // 128)
    if dtype == torch.bfloat16:
        words = philox(np.arange(units * 16), stream, seed).reshape(units, 16, 4).transpose(0, 2, 1)
        return np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(-1)[:n]
    words = philox(np.arange(units * 32), stream, seed).reshape(units, 2, 16, 4)
    return words.transpose(0, 3, 2, 1).reshape(-1)[:n]
