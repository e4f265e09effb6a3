"""The library of autograd nodes, called from Python: a formula's value, with a backward that calls its other kernels.

Each operator returns None for what it does not take: then nothing was computed. See ``csrc/node/node.cpp``.
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

__all__ = ["elementwise", "elementwise_of_one", "index", "reduced"]

_indices: dict[str, int] = {}
_connected: bool | None = None

elementwise_of_one: Any
elementwise: Any
reduced: Any


def index(formula: Formula) -> int:
    """The place of the formula's kernels in the library, -1 if there are none of exactly this formula."""
    found = _indices.get(formula.name)
    if found is None:
        found = _indices[formula.name] = _find(formula) if _connect() else -1
    return found


def _find(formula: Formula) -> int:
    place: int = torch.ops.torchcalc_nodes.find.default(formula.name, formula.hash)
    return place


def _connect() -> bool:
    """Give the nodes the table of kernels, and the formulas for backward of backward."""
    global _connected, elementwise_of_one, elementwise, reduced
    if _connected is None:
        _connected = native.nodes()
        if _connected:
            library = ctypes.CDLL(str(native.library()))
            library.torchcalc_table.restype = ctypes.c_void_p
            ops = torch.ops.torchcalc_nodes
            ops.connect.default(library.torchcalc_table())
            elementwise_of_one = ops.elementwise_of_one.default
            elementwise, reduced = ops.elementwise.default, ops.reduced.default
            _register_second_derivatives()
    return _connected


_library: Any = None


def _register_second_derivatives() -> None:
    global _library
    from torchcalc.formula.pointwise import FORMULAS, gradients

    def differentiable_backward(
        name: str, g: Tensor, saved: Sequence[Tensor | None], numbers: Sequence[float], needed: Sequence[bool]
    ) -> list[Tensor]:
        formula = FORMULAS[name]
        known = dict(zip((*formula.inputs, *formula.parameters), (*saved[:-1], *numbers), strict=True)) | {"y": saved[-1]}
        return [grad for grad in gradients(formula, g, known, needed) if grad is not None]

    _library = torch.library.Library("torchcalc_nodes", "FRAGMENT")
    for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition", "Batched"):  # vmap's two kinds too
        _library.impl("differentiable_backward", differentiable_backward, key)
