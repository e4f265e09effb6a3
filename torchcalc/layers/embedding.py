"""Embedding:  Y_n = s·W[i_n],  the rows of W that the indices i name, times a number s.

Derivation.  Y is linear in W, and a row of W takes part in every Y_n that names it: with G = ∂L/∂Y

    ∂L/∂W_v = s·Σ_{n: i_n = v} G_n,                                               (1)

a sum over the uses. With ``scale_grad_by_freq`` it is divided by their number; the row ``padding_idx`` gets nothing. (1) is
linear in G, so its own derivative leads back to Y's form:

    ∂L/∂G_n = s·U[i_n]   where U is the gradient of (1), without the padding's row. (2)

In forward mode Ẏ_n = s·Ẇ[i_n]. Saves the indices alone, and of W its size.

s is there since attention's models scale their embeddings by √D (Vaswani et al. 2017, section 3.4): as an argument it costs
no second tensor.

Reference: Bengio et al. 2003, "A neural probabilistic language model".
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchcalc import native
from torchcalc.autograd import Function
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import widen
from torchcalc.tracing import NotScripted, leaf

__all__ = ["Embedding", "embedding"]


def gradient(
    g: Tensor, index: Tensor, rows: int, padding: int, by_frequency: bool, sparse: bool, scale: float
) -> Tensor:
    """(1), by operations that have derivatives of their own unless it is sparse."""
    if sparse:
        return torch.ops.aten.embedding_sparse_backward(g, index, rows, padding, by_frequency) * scale
    each = widen(g).reshape(index.numel(), g.shape[-1]) * scale
    named = index.reshape(-1).long()
    each = each.masked_fill((named == padding)[:, None], 0.0)
    if by_frequency:
        counts = torch.zeros(rows, dtype=each.dtype, device=g.device).index_add(0, named, torch.ones_like(each[:, 0]))
        each = each / counts[named][:, None]
    return torch.zeros((rows, g.shape[-1]), dtype=each.dtype, device=g.device).index_add(0, named, each).to(g.dtype)


class EmbeddingFunction(Function):
    @staticmethod
    def forward(w: Tensor, index: Tensor, padding: int, by_frequency: bool, sparse: bool, scale: float) -> Tensor:
        y = torch.embedding(w, index, padding, by_frequency, sparse)
        return y if scale == 1 else y * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, index, *ctx.how = inputs
        ctx.rows = len(w)
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return gradient(g, index, ctx.rows, *ctx.how), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dw: Tensor, *_: Any) -> Tensor:
        (index,) = ctx.saved_tensors
        return F.embedding(index, dw) * ctx.how[-1]


@leaf
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    scale: float = 1.0,
) -> Tensor:
    """The rows of weight that input names, times a number, as ``torch.nn.functional.embedding``.

    Args:
        input: indices of any shape ``(*)``, int32 or int64, in [0, V).
        weight: ``(V, D)``, of float dtype.
        padding_idx: the row that gets no gradient, in [-V, V), or None.
        max_norm: rows that are named and longer than this are shortened to it first, in ``weight`` itself; None leaves them.
        norm_type: p of that length.
        scale_grad_by_freq: whether a row's gradient is divided by the number of its uses.
        sparse: whether the gradient is a sparse tensor, of the rows that were named.
        scale: what the rows are multiplied by; √D in many language models.

    Returns:
        ``(*, D)`` of weight's dtype.

    Raises:
        IndexError: if an index is out of range.
        RuntimeError: if weight has not two dimensions, or input is not of integers, as torch.
        AssertionError: if ``padding_idx`` is out of range, as torch.

    Differs from torch: forward mode and all second derivatives work, also with ``scale_grad_by_freq``.

    Reference: Bengio et al. 2003, "A neural probabilistic language model".

    >>> w = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    >>> embedding(torch.tensor([1, 1]), w).sum().backward()
    >>> w.grad
    tensor([[0., 0.],
            [2., 2.]])
    """
    compiling = torch.compiler.is_compiling()
    nodes = None if compiling else kernels.rows()
    if nodes is not None and max_norm is None:
        found: Tensor | None = nodes.embedding(weight, input, padding_idx, scale_grad_by_freq, sparse, scale)
        if found is not None:
            return found
    if compiling or not isinstance(weight, Tensor) or weight.dim() != 2 or input.is_nested:
        y = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return y if scale == 1 else y * scale
    rows = len(weight)
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise AssertionError(f"Padding_idx must be within num_embeddings: it is {padding_idx}, of {rows} rows")
    if max_norm is not None:
        input = input.contiguous()
        with torch.no_grad():
            torch.embedding_renorm_(weight, input, max_norm, norm_type)
        return embedding(input, weight, padding_idx, None, norm_type, scale_grad_by_freq, sparse, scale=scale)
    if nodes is None:
        native.warn_once((weight,), nodes=True)
    padding = -1 if padding_idx is None else padding_idx % rows
    y = EmbeddingFunction.apply(weight, input, padding, scale_grad_by_freq, sparse, float(scale))
    return y


class Embedding(NotScripted, nn.Embedding):
    """Module of :func:`embedding`: parameters, initialisation and ``state_dict`` of ``torch.nn.Embedding``.

    Args:
        num_embeddings: V, how many rows the table has.
        embedding_dim: D, how many numbers a row has.
        padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, scale: of :func:`embedding`.
        device, dtype: of the weight.

    >>> Embedding(10, 4, scale=2.0)
    Embedding(10, 4, scale=2.0)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, _freeze,
            device, dtype,
        )  # fmt: skip
        self.scale = scale

    def extra_repr(self) -> str:
        """torch's, and the scale."""
        return super().extra_repr() + ("" if self.scale == 1 else f", scale={self.scale}")

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`embedding` to indices of any shape."""
        return embedding(
            input, self.weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse,
            scale=self.scale,
        )  # fmt: skip
