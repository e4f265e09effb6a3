"""Soft cap:  y = c·tanh(x/c), which is near x for |x| ≪ c and stays below c: of attention scores and logits.

Derivation.  tanh' = 1 - tanh² (tanh.py), and the inner derivative 1/c meets the factor c:

    y' = 1 - tanh²(x/c).                                                          (1)

The map is elementwise, J = diag(y') = Jᵀ: backward and jvp are the same product. Saves x, since of a y of 16 bits that is near c
the difference to c is lost.

Reference: Bello et al. 2016, arXiv:1611.09940 (as C·tanh(u)); Gemma Team 2024, "Gemma 2", arXiv:2408.00118.
"""

import math

from torch import Tensor

from torchcalc.formula import Term, pointwise

__all__ = ["softcap"]


def value(x: Term, *, cap: float) -> Term:
    return (x / cap).tanh() * cap


def slope(x: Term, g: Term, *, cap: float) -> Term:
    t = (x / cap).tanh()
    return g * (1 - t * t)  # (1) times g


_softcap = pointwise("Softcap", value, slope)


def softcap(input: Tensor, cap: float) -> Tensor:
    """cap·tanh(input/cap), elementwise.

    Args:
        input: tensor of any shape and float dtype.
        cap: what the result's absolute value stays below, > 0 and finite; Gemma 2 takes 50 for attention scores, 30 for logits.

    Returns:
        Tensor of the same shape and dtype, in [-cap, cap].

    Raises:
        ValueError: if ``cap`` is not positive and finite.

    Reference: Gemma Team 2024, arXiv:2408.00118.

    >>> import torch
    >>> x = torch.tensor([0.0, 100.0], requires_grad=True)
    >>> y = softcap(x, 30.0)
    >>> y.sum().backward()
    >>> [f"{v:.2f}" for v in (*y, *x.grad)]
    ['0.00', '29.92', '1.00', '0.01']
    """
    if not 0 < cap < math.inf:
        raise ValueError(f"cap={cap}: what the result stays below, > 0 and finite, e.g. 30.0")
    return _softcap(input, float(cap))
