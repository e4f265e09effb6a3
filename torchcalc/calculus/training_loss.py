"""The training loss as a function of its parameters alone, so that it can be differentiated again and again.

    f(p) = Σᵢ nᵢ·ℓ(model(xᵢ; p), yᵢ) / Σᵢ nᵢ       over batches i of nᵢ samples      (1)

What else a forward pass reads and writes is held still: buffers are copies that are thrown away (batch norm's running
statistics), and the random numbers, torch's, Python's and NumPy's, are the same at every call (one dropout mask per batch),
drawn from generators that stand afterwards where they stood before. So f is a function in the sense of mathematics, and
its derivatives exist.
Parameters are passed in, and gradients are those of what is passed: ``.grad`` is never touched.

Reference: Vapnik 1991, "Principles of risk minimization for learning theory", NeurIPS 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchcalc.calculus.operations import checkpointed
from torchcalc.calculus.random_numbers import random_numbers_kept

__all__ = ["TrainingLoss", "held_batches", "training_loss"]

Batch = tuple[Any, Any]


class TrainingLoss:
    """A callable on a dict of parameters; made by :func:`training_loss`.

    Attributes:
        parts: callables whose sum is the loss, one for each batch: each is evaluated, and its graph freed, by itself.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> f = training_loss(model, nn.functional.mse_loss, (torch.tensor([[3.0]]), torch.tensor([[6.0]])))
    >>> len(f.parts), f({"weight": torch.tensor([[2.0]])}).item()  # 3·2 = 6
    (1, 0.0)
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: list[Batch]) -> None:
        self._model, self._loss, self._seed = model, loss, torch.initial_seed()
        sizes = [_size(batch) for batch in batches]
        total = sum(sizes)
        self.parts: list[Callable[[Mapping[str, Tensor]], Tensor]] = [
            partial(self._part, i, batch, n / total) for i, (batch, n) in enumerate(zip(batches, sizes, strict=True))
        ]

    @property
    def names(self) -> list[str]:
        """The names of the model's trainable parameters."""
        return [name for name, p in self._model.named_parameters() if p.requires_grad]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Detached copies of the model's trainable parameters, as they are now; a tied one once."""
        return {name: p.detach().clone() for name, p in self._model.named_parameters() if p.requires_grad}

    def __call__(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The loss (1) at these parameters; those of the model that are not named stay as they are."""
        total = self.parts[0](parameters)
        for part in self.parts[1:]:
            total = total + part(parameters)
        return total

    def _part(self, index: int, batch: Batch, weight: float, parameters: Mapping[str, Tensor]) -> Tensor:
        unknown = parameters.keys() - {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        if unknown:
            raise ValueError(f"parameters: {sorted(unknown)} are no parameters of the model; start from .parameters")
        x, y = batch
        buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        with random_numbers_kept(self._seed + index, {p.device for p in parameters.values()}):
            value = self._loss(functional_call(self._model, {**buffers, **parameters}, x), y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss returned {shape}; it must return a scalar tensor: use reduction='mean'")
        if checkpointed(value):
            raise RuntimeError(
                "model: a part of it is computed again in backward (torch.utils.checkpoint), where its own parameters are "
                "back in place of those passed in; switch gradient checkpointing off for the measurement"
            )
        return weight * value.reshape(())


def training_loss(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: Batch | Iterable[Batch]
) -> TrainingLoss:
    """The mean loss of a model over fixed batches, as a function of its parameters.

    Every call leaves the model's parameters, buffers, mode and ``.grad``, and all random number generators, as they
    were, and draws the same random numbers: dropout has the same mask each time. The mode is the model's own at the
    time of the call: in training mode batch norm uses the statistics of the batch.

    Args:
        model: any module with trainable parameters; frozen ones stay constants, tied ones count once.
        loss: ``loss(output, target)``, the mean over the samples of a batch: a scalar tensor.
        batches: one ``(x, y)`` or an iterable of them, held and moved to the model's device. x is what the model takes;
            a tuple is taken apart into arguments. Two tuples or lists are two batches, any other pair is one. The batches
            are weighted by their sizes (the first dimension of x).

    Returns:
        A callable on a dict of parameters, such as ``.parameters`` (detached copies of the trainable ones).

    Raises:
        ValueError: no batch, or one without samples, or no trainable parameter. TypeError: batches is no iterable.
        When called, RuntimeError: the model uses gradient checkpointing.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> f = training_loss(model, nn.functional.mse_loss, (torch.tensor([[3.0]]), torch.tensor([[6.0]])))
    >>> f({"weight": torch.tensor([[1.0]])})  # (3·1 − 6)²
    tensor(9.)
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model: it has no parameter that requires grad; unfreeze some with requires_grad_()")
    return TrainingLoss(model, loss, held_batches(batches, trainable[0].device))


def held_batches(batches: Batch | Iterable[Batch], device: torch.device) -> list[Batch]:
    """A batch, or an iterable of them, as a list of pairs (x, y) on a device; a DataLoader's order is drawn without a trace."""
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: a {type(batches).__name__}; pass one (x, y) or an iterable of them")
    pair = isinstance(batches, (tuple, list)) and len(batches) == 2
    one = pair and not all(isinstance(each, (tuple, list)) for each in batches)
    with random_numbers_kept(), torch.inference_mode(False):
        held = [_to(batch, device) for batch in ([batches] if one else batches)]
    if not held:
        raise ValueError("batches: it is empty; pass one (x, y) or an iterable of them")
    for i, batch in enumerate(held):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"batches: each must be a pair (x, y), not {type(batch).__name__}; see Args")
        if not _size(batch):
            raise ValueError(f"batches: number {i} has no samples; leave it out")
    return [(x, y) for x, y in held]


def _to(value: Any, device: torch.device) -> Any:
    """Tensors in nested tuples, lists and dicts, on a device."""
    if isinstance(value, Tensor):
        return value.clone().to(device) if value.is_inference() else value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(v, device) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        moved = [_to(v, device) for v in value]
        return moved if isinstance(value, list) else tuple(moved)
    return value


def _size(value: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor."""
    while isinstance(value, (tuple, list, Mapping)):
        value = next(iter(value.values() if isinstance(value, Mapping) else value), None)
    return int(value.shape[0]) if isinstance(value, Tensor) and value.dim() else 1
