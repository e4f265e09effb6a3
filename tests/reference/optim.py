"""Optimizers that torch does not have, in float64 numpy, as their papers write them: one array in, one array out.

A reference is ``reference(p, gradients, **hyper) -> p`` over a whole trajectory. A gradient that is missing is None:
then nothing of the parameter changes, its state included.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def lion(
    p: Array,
    gradients: Sequence[Array | None],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Array:
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2: c interpolates, the sign steps, m follows."""
    m = np.zeros_like(p)
    for gradient in gradients:
        if gradient is None:
            continue
        g = -gradient if maximize else gradient
        c = betas[0] * m + (1 - betas[0]) * g
        p = p - lr * (np.sign(c) + weight_decay * p)
        m = betas[1] * m + (1 - betas[1]) * g
    return p


def gradient_descent(p: Array, gradients: Sequence[Array | None], *, lr: float = 1e-3, maximize: bool = False) -> Array:
    """new = old - lr * gradient."""
    for g in gradients:
        if g is not None:
            p = p + lr * g if maximize else p - lr * g
    return p
