"""One number per layer: which parameters make up a layer, in which order, and the norms of many tensors at once.

A layer is a module that owns trainable parameters itself; its name is the module's. Depth is the order in which the modules
were registered, that of ``model.named_parameters()``: for a Sequential, and for most models, that of the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["layers_of", "norms"]

Name = TypeVar("Name", bound=Hashable)
WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)  # compile, FSDP, activation checkpointing


def layers_of(
    model: nn.Module, among: Iterable[Tensor] | None = None, *, frozen: bool = False
) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each layer, by the layer's name, in the order of registration.

    Args:
        model: any module; tied parameters belong to the layer that names them first.
        among: leave out the parameters, and with them layers, that are not among these.
        frozen: include parameters that do not require a gradient.

    >>> list(layers_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
    ['0', '2']
    """
    wanted = None if among is None else {id(p) for p in among}
    layers: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if (frozen or p.requires_grad) and (wanted is None or id(p) in wanted):
            *path, _ = (part for part in name.split(".") if part not in WRAPPERS)
            layers.setdefault(".".join(path) or type(model).__name__, []).append(p)
    return layers


def norms(tensors: Mapping[Name, list[Tensor]]) -> dict[Name, float]:
    """The Euclidean norm of each list of tensors as one vector, for all lists with one transfer from the device.

    In float32 the squares of numbers below 1e-22 underflow, and those above 1e19 overflow; since gradients that vanish or
    explode are what one looks for, norms that may have suffered from it are taken again in float64. Sparse, complex and
    distributed tensors are taken as what they stand for. An empty list has the norm nan.

    >>> norms({"a": [torch.tensor([3.0]), torch.tensor([4.0])], "b": [torch.full((4,), 0.25)], "c": []})
    {'a': 5.0, 'b': 0.5, 'c': nan}
    """
    flat = [plain(t) for each in tensors.values() for t in each]
    found: list[float] = [0.0] * len(flat)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(flat):
        kinds.setdefault((t.device, t.dtype), []).append(i)
    for (_, dtype), places in kinds.items():
        wide = {} if dtype.itemsize >= 4 else {"dtype": torch.float32}
        lengths = torch._foreach_norm([flat[i] for i in places], 2, **wide)
        for i, value in zip(places, torch.stack([whole(n) for n in lengths]).tolist(), strict=True):
            if not 1e-15 < value < 1e18 and flat[i].device.type != "mps":  # MPS has no float64
                value = whole(torch.linalg.vector_norm(flat[i].double())).item()
            found[i] = value
    values = iter(found)
    return {name: math.hypot(*(next(values) for _ in each)) if each else math.nan for name, each in tensors.items()}


def plain(t: Tensor) -> Tensor:
    """The numbers that count: the values of a sparse tensor, the real and imaginary parts of a complex one."""
    t = t.detach()
    if t.layout == torch.sparse_coo:
        t = t.coalesce().values()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def whole(t: Tensor) -> Tensor:
    """The value of a DTensor of which every rank holds a part; all ranks must ask for it."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t
