"""Update ratio: how far a step moves each layer, relative to the layer's length, ‖Δw‖ / ‖w‖.

It is what the learning rate amounts to, layer by layer, whatever the optimizer: near 1e-3 training usually goes well; a
layer far below barely learns, one far above is rewritten rather than refined.

Reference: Karpathy 2015, CS231n, "Ratio of weights:updates".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from torchcalc.instruments.gradient_flow import DepthInstrument
from torchcalc.instruments.instrument import guarded
from torchcalc.instruments.layers import layers_of, norms

__all__ = ["UpdateRatio", "update_ratios"]


def update_ratios(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, float]:
    """‖w − before‖ / ‖before‖ of each layer of a model.

    Args:
        model: after the step.
        before: its parameters before the step, by name: ``{n: p.detach().clone() for n, p in model.named_parameters()}``.
            Layers with a parameter that is not there are left out.

    Returns:
        By layer; nan where the layer was zero before.

    Raises:
        ValueError: a tensor of another shape than the parameter's.

    >>> import torch
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> update_ratios(model, {"weight": torch.tensor([[1.0, 0.0]])})
    {'Linear': 1.0}
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if name in before and before[name].shape != p.shape:
            shapes = f"{tuple(before[name].shape)}, the parameter {tuple(p.shape)}"
            raise ValueError(f"before[{name!r}] has shape {shapes}: copy the parameters of this model; see Args")
    layers = {k: each for k, each in layers_of(model).items() if all(names[id(p)] in before for p in each)}
    return ratios({k: [(p, before[names[id(p)]]) for p in each] for k, each in layers.items()})


def ratios(pairs: Mapping[str, list[tuple[nn.Parameter, Tensor]]]) -> dict[str, float]:
    moved = {("moved", name): [p.detach() - old for p, old in each] for name, each in pairs.items()}
    lengths = {("length", name): [old for _, old in each] for name, each in pairs.items()}
    found = norms(moved | lengths)
    return {k: found["moved", k] / found["length", k] if found["length", k] else float("nan") for k in pairs}


class UpdateRatio(DepthInstrument):
    """Curves ``update_ratio/<layer>`` and a heat map over depth and time, ``figures/update_ratio``.

    The update is that of a whole batch: of one step of the optimizer, or of all that manual optimization takes in it, with
    momentum, preconditioning and weight decay. For this the weights are copied at the batches that are measured. A step
    that GradScaler skips has the ratio 0.

    Args:
        every_n_steps, max_layers, columns, budget: as in :class:`~torchcalc.instruments.GradientFlow`.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: no logger; FSDPStrategy or DeepSpeedStrategy, under which weights lie in pieces.

    >>> UpdateRatio().title
    'update / weight'
    """

    group, title, centre = "update_ratio", "update / weight", 1e-3

    def __init__(
        self, *, every_n_steps: int | None = None, max_layers: int = 7, columns: int = 400, budget: float | None = 0.01
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, max_layers=max_layers, columns=columns, budget=budget)
        self.before: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}

    @guarded
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Copy the weights, if it is time to."""
        if self.due(trainer, optimizer):
            layers = self.layers_of(pl_module, optimizer)
            self.before |= {name: [(p, p.detach().clone()) for p in each] for name, each in layers.items()}

    @guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the weights with their copies."""
        if self.before:
            before, self.before = self.before, {}
            self.record(trainer, pl_module, ratios(before))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the copies."""
        self.before = {}
