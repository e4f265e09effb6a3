"""The library of autograd nodes, called from Python: a formula's value, with a backward that calls its other kernels; and
cross-entropy, softmax and norms, likewise.

Each function returns None for what it does not take: then nothing was computed. See ``csrc/node/node.cpp``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchcalc import native

if TYPE_CHECKING:
    from torchcalc.formula.pointwise import Formula

__all__ = [
    "REDUCTIONS",
    "ROW_REDUCTIONS",
    "elementwise",
    "enter_launch",
    "in_place",
    "index",
    "of_halves",
    "reduced",
    "rows",
    "saved",
]

#: torch's numbers for them.
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
#: And "none" in the dtype that is computed in.
ROW_REDUCTIONS = {**REDUCTIONS, "wide": 3}

_indices: dict[Formula, int] = {}
_connected: bool | None = None

#: elementwise(index, *inputs, *numbers), in_place(index, input, *numbers), of_halves(index, input, dim, *numbers),
#: reduced(index, *inputs, weight or None, reduction, by_weight, *numbers)
elementwise: Any
in_place: Any
of_halves: Any
reduced: Any
#: enter_launch(place, kind, dtype, device's index, function, threads, shared memory, block, parameters, numbers)
enter_launch: Any


def index(formula: Formula) -> int:
    """The place of the formula's kernels in the library, -1 if there are none of exactly this formula."""
    found = _indices.get(formula)
    if found is None:
        found = _indices[formula] = _nodes.find(formula.name, formula.hash) if _connect() else -1
    return found


def rows() -> Any:
    """The module with functions of rows, and what steps and launches on a GPU use; None where it is not there.

    cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, z_loss), softmax(input, dim, log),
    rms_norm(input, residual, weight, normalized_shape, eps), layer_norm(input, weight, bias, normalized_shape, eps),
    group_norm(input, weight, bias, num_groups, eps), attention(query, key, value, mask, causal, scale, grouped),
    linear(input, weight, bias),
    mlp(place, input, weight, bias, up_weight, up_bias, down_weight, down_bias, recompute),
    embedding(weight, index, padding or None, by_frequency, sparse, scale), dropout(input, p).
    """
    return _nodes if _connect() else None


def saved(node: Any) -> list[Any] | None:
    """What one of these nodes keeps for backward, as torch's SavedTensor; None of any other node."""
    if type(node).__name__ != "CppFunction" or not _connected:
        return None
    found: list[Any] | None = _nodes.saved(node)
    return found


def _connect() -> bool:
    """Give the nodes the table of kernels, and the formulas for backward of backward."""
    global _connected, _nodes, elementwise, in_place, of_halves, reduced, enter_launch
    if _connected is None:
        _nodes = native.nodes()
        _connected = _nodes is not None
        if _connected:
            library = ctypes.CDLL(str(native.library()))
            library.torchcalc_table.restype = ctypes.c_void_p
            _nodes.connect(library.torchcalc_table())
            elementwise, in_place, of_halves = _nodes.elementwise, _nodes.in_place, _nodes.of_halves
            reduced, enter_launch = _nodes.reduced, _nodes.enter_launch
            _register_second_derivatives()
    return _connected


_nodes: Any = None
_library: Any = None


def _register_second_derivatives() -> None:
    global _library
    from torchcalc.formula.pointwise import FORMULAS, gradients
    from torchcalc.layers import attention, dropout, embedding, group_norm, layer_norm, mlp, rms_norm, softmax
    from torchcalc.losses.cross_entropy import gradients as cross_entropy_gradients
    from torchcalc.promotion import like, widen

    def given(grads: Sequence[Tensor | None]) -> list[Tensor]:
        return [grad for grad in grads if grad is not None]

    def differentiable_backward(
        name: str, g: Tensor, saved: Sequence[Tensor | None], numbers: Sequence[float], needed: Sequence[bool]
    ) -> list[Tensor]:
        formula = FORMULAS[name]
        known = dict(zip((*formula.inputs, *formula.parameters), (*saved[:-1], *numbers), strict=True)) | {
            "y": saved[-1]
        }
        return given(gradients(formula, g, known, needed))

    def softmax_backward(g: Tensor, y: Tensor, dim: int, log: bool) -> Tensor:
        return like((softmax.log_softmax_backward if log else softmax.softmax_backward)(y, g, dim), y)

    def cross_entropy_backward(
        g: Tensor,
        x: Tensor,
        target: Tensor,
        w: Tensor | None,
        ignored: int,
        reduction: int,
        smoothing: float,
        z_loss: float,
    ) -> Tensor:
        name = next(name for name, code in ROW_REDUCTIONS.items() if code == reduction)
        (grad, *_) = cross_entropy_gradients(g, x, target, w, ignored, name, smoothing, z_loss)
        return grad

    def rms_norm_backward(
        g: Tensor,
        added: Tensor | None,
        x: Tensor,
        r: Tensor,
        w: Tensor | None,
        dims: int,
        eps: float,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        if torch.is_grad_enabled():
            r = rms_norm.rstd(widen(x), dims, eps)
        grad_x, grad_w = rms_norm.gradients(g, None, x, w, r, dims, needed)
        if grad_x is not None:
            grad_x = like(grad_x if added is None else grad_x + added, x)
        return given((grad_x, grad_w))

    def layer_norm_backward(
        g: Tensor,
        x: Tensor,
        m: Tensor,
        r: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        dims: int,
        eps: float,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        if torch.is_grad_enabled():
            m, r = layer_norm.statistics(widen(x), rms_norm.of_rows(x, dims), eps)
        return given(layer_norm.gradients(g, None, None, x, m, r, w, b, dims, needed))

    def group_norm_backward(
        g: Tensor,
        x: Tensor,
        m: Tensor,
        r: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        groups: int,
        eps: float,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        if torch.is_grad_enabled():
            m, r = group_norm.statistics(x, groups, eps)
        return given(group_norm.gradients(g, None, None, x, m, r, w, b, groups, needed))

    def attention_backward(
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        return given(attention.backward(g, q, k, v, mask, causal, scale, (*needed, False)))

    def mlp_backward(
        name: str,
        g: Tensor,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        w_up: Tensor | None,
        b_up: Tensor | None,
        w_down: Tensor,
        b_down: Tensor | None,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        parts = w, b, w_up, b_up, w_down, b_down
        hidden = mlp.hidden_of(x, parts)
        return given(mlp.gradients(FORMULAS[name], g, [None] * len(hidden), x, parts, hidden, needed))

    def embedding_backward(
        g: Tensor, index: Tensor, rows: int, padding: int, by_frequency: bool, sparse: bool, scale: float
    ) -> Tensor:
        return embedding.gradient(g, index, rows, padding, by_frequency, sparse, scale)

    def dropout_backward(g: Tensor, keep: Tensor, p: float) -> Tensor:
        return dropout.kept(g, keep, p)

    _library = torch.library.Library("torchcalc_nodes", "FRAGMENT")
    for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition", "Batched"):  # vmap's two kinds too
        for backward in (
            differentiable_backward,
            softmax_backward,
            cross_entropy_backward,
            rms_norm_backward,
            layer_norm_backward,
            group_norm_backward,
            attention_backward,
            mlp_backward,
            embedding_backward,
            dropout_backward,
        ):
            _library.impl(backward.__name__, backward, key)
