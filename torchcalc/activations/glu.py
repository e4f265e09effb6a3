"""Gated linear units:  y = a·σ(b), and its kin  silu(a)·b,  gelu(a)·b,  relu(a)·b.

Derivation.  By the product rule each factor is the slope of the other. For y = a·σ(b), with σ' = σ·(1 - σ),

    ∂y/∂a = σ(b),   ∂y/∂b = a·σ(b)·(1 - σ(b)),                                    (1)

and for y = φ(a)·b, φ = silu, gelu or relu, whose φ' is derived in silu.py, gelu.py and relu.py,

    ∂y/∂a = φ'(a)·b,   ∂y/∂b = φ(a).                                              (2)

The maps are elementwise in a and b: backward and jvp are the same products. Saves a and b. :func:`glu` takes a and b
from one tensor, halved along a dimension.

Reference: Dauphin, Fan, Auli, Grangier 2017, arXiv:1612.08083; Shazeer 2020, "GLU variants improve transformer",
arXiv:2002.05202.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc.activations import gelu, relu, silu
from torchcalc.formula import Term, pointwise
from torchcalc.formula.dispatch import of_halves
from torchcalc.formula.pointwise import FORMULAS
from torchcalc.tracing import NotScripted, leaf

__all__ = ["GLU", "geglu", "glu", "reglu", "swiglu"]


def value(a: Term, b: Term) -> Term:
    return a * b.sigmoid()


def slope_a(b: Term) -> Term:
    return b.sigmoid()  # (1)


def slope_b(a: Term, b: Term) -> Term:
    s = b.sigmoid()
    return a * (s * (1 - s))  # (1)


def gate(name: str, phi: Callable[[Term], Term], slope: Callable[[Term], Term]) -> Callable[..., Tensor]:
    """φ(a)·b."""
    return pointwise(name, lambda a, b: phi(a) * b, lambda a, b: slope(a) * b, lambda a: phi(a), whole=True)  # (2)


def reglu_value(a: Term, b: Term) -> Term:
    return relu.value(a) * b


def reglu_slope_a(a: Term, b: Term, g: Term) -> Term:
    return relu.slope(a, g * b)  # (2); with g·b instead of g it selects, and does not multiply


def reglu_slope_b(a: Term) -> Term:
    return relu.value(a)


_glu = pointwise("GLU", value, slope_a, slope_b)


def _glu_by_chunks(input: Tensor, dim: int) -> Tensor:
    if input.dim() == 0:
        raise RuntimeError("glu does not support scalars because halving size must be even")
    if not input.is_floating_point():
        return F.glu(input, dim)  # refuses
    if (size := input.size(dim)) % 2:
        at = dim % input.dim()
        raise RuntimeError(f"Halving dimension must be even, but dimension {at} is size {size}")
    return _glu(*input.chunk(2, dim))


_glu_of_halves = of_halves(FORMULAS["GLU"], _glu_by_chunks)
_swiglu = gate("SwiGLU", silu.value, silu.slope)
_geglu = gate("GEGLU", gelu.value, gelu.slope)
_geglu_tanh = gate("GEGLUTanh", gelu.tanh_value, gelu.tanh_slope)
_reglu = pointwise("ReGLU", reglu_value, reglu_slope_a, reglu_slope_b, whole=True)


@leaf
def glu(input: Tensor, dim: int = -1) -> Tensor:
    """a·σ(b), where a and b are the halves of input along a dimension, as ``torch.nn.functional.glu``.

    Args:
        input: tensor of one dimension or more and float dtype.
        dim: the dimension, of even size.

    Returns:
        Tensor of input's dtype; its size in ``dim`` is half of input's.

    Raises:
        RuntimeError: if ``input`` has no dimension or its size in ``dim`` is odd.
        IndexError: if ``dim`` is none of input's dimensions.

    Reference: Dauphin, Fan, Auli, Grangier 2017, arXiv:1612.08083.

    >>> import torch
    >>> glu(torch.tensor([3.0, 4.0, 0.0, 100.0]))
    tensor([1.5000, 4.0000])
    """
    return _glu_of_halves(input, dim)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a)·b, the gate of most language models' feed-forward layers.

    Args:
        a: tensor of any shape and float dtype: what opens the gate.
        b: tensor of the same shape, or one that broadcasts: what passes it.

    Returns:
        Tensor of the common shape and dtype.

    Reference: Shazeer 2020, arXiv:2002.05202.

    >>> import torch
    >>> swiglu(torch.tensor([1.0, -100.0]), torch.tensor([2.0, 2.0]))
    tensor([1.4621, -0.0000])
    """
    return _swiglu(a, b)


def geglu(a: Tensor, b: Tensor, approximate: str = "none") -> Tensor:
    """gelu(a)·b.

    Args:
        a: tensor of any shape and float dtype: what opens the gate.
        b: tensor of the same shape, or one that broadcasts: what passes it.
        approximate: of :func:`gelu`: ``"none"`` or ``"tanh"``.

    Returns:
        Tensor of the common shape and dtype.

    Raises:
        RuntimeError: if ``approximate`` is neither.

    Reference: Shazeer 2020, arXiv:2002.05202.

    >>> import torch
    >>> geglu(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]))
    tensor([1.6827, 0.0000])
    """
    return (_geglu_tanh if gelu.is_tanh(approximate) else _geglu)(a, b)


def reglu(a: Tensor, b: Tensor) -> Tensor:
    """relu(a)·b.

    Args:
        a: tensor of any shape and float dtype: what opens the gate.
        b: tensor of the same shape, or one that broadcasts: what passes it.

    Returns:
        Tensor of the common shape and dtype.

    Reference: Shazeer 2020, arXiv:2002.05202.

    >>> import torch
    >>> reglu(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 2.0]))
    tensor([2., 0.])
    """
    return _reglu(a, b)


class GLU(NotScripted, nn.GLU):
    """Module of :func:`glu`, as ``torch.nn.GLU``.

    >>> import torch
    >>> GLU(dim=0)(torch.tensor([3.0, 0.0]))
    tensor([1.5000])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`glu`; halves ``dim``."""
        return glu(input, self.dim)
