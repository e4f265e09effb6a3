"""Gradient flow: the norm of the gradient at each layer, over depth and time.

By the chain rule the gradient at a layer is a product with the Jacobians of all layers above it. A product of many factors
below 1 vanishes, of many above 1 explodes: in the heat map a network that learns at every depth has one colour from top to
bottom, one whose gradient vanishes darkens towards its first layers.

Reference: Glorot, Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from torchcalc.instruments.history import DepthHistory
from torchcalc.instruments.instrument import Chart, Instrument, check_at_least_one, guarded, steps_of
from torchcalc.instruments.layers import layers_of, norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradientFlow", "gradient_norms"]


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """The norm of the gradient of each layer of a model, after ``loss.backward()``.

    A layer is a module that owns trainable parameters; the order is that of registration. Its norm is that of the gradients
    of all its parameters as one vector; nan where there is no gradient. One transfer from the device for all layers.

    Args:
        model: after backward.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    >>> _ = nn.init.constant_(model[0].weight, 2.0)
    >>> (model(torch.tensor([3.0])) / 2).backward()
    >>> gradient_norms(model)
    {'0': 1.5}
    """
    return norms({name: [p.grad for p in each if p.grad is not None] for name, each in layers_of(model).items()})


class DepthInstrument(Instrument):
    """An instrument that measures one number per layer; see :class:`GradientFlow` for its arguments."""

    group: str  #: of the curves' tags
    title: str
    centre: float | None = None

    def __init__(
        self, *, every_n_steps: int | None = None, max_layers: int = 7, columns: int = 400, budget: float | None = 0.01
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, budget=budget)
        check_at_least_one("max_layers", max_layers)
        self.max_layers = max_layers
        self.history = DepthHistory(columns)
        self.known: dict[tuple[int, tuple[bool, ...]], dict[str, list[nn.Parameter]]] = {}
        self.thin: set[str] = set()  # the layers that get curves

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.known = {}
        if trainer.global_step == 0:  # another training than the one before
            self.history, self.measured = DepthHistory(self.history.columns), {}

    def layers_of(self, pl_module: LightningModule, optimizer: Optimizer) -> dict[str, list[nn.Parameter]]:
        """The layers that an optimizer trains; looked up again when parameters are added, frozen or unfrozen."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        key = id(optimizer), tuple(p.requires_grad for p in params)
        if key not in self.known:
            self.known[key] = layers_of(pl_module, params)
            self.thin = thinned(list(layers_of(pl_module)), self.max_layers)
        return self.known[key]

    def record(self, trainer: Trainer, pl_module: LightningModule, values: Mapping[str, float]) -> None:
        """Add the values of some layers, by name, to the history and to the curves."""
        if not len(self.history):  # rows in order of depth, whichever optimizer steps and whatever is unfrozen first
            values = dict.fromkeys(layers_of(pl_module, frozen=True), math.nan) | dict(values)
        self.history.add(steps_of(trainer), values)
        self.write_curves(
            trainer, {f"{self.group}/{k}": v for k, v in values.items() if k in self.thin and not math.isnan(v)}
        )

    def charts(self) -> list[Chart]:
        return [("gradients and updates", self.title, [f"^{self.group}/"])]

    def draw(self, trainer: Trainer) -> dict[str, Figure]:
        if not len(self.history):
            return {}
        return {f"figures/{self.group}": self.history.figure(f"{self.title}, layer by layer", centre=self.centre)}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict(), "measured": dict(self.measured)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])
        self.measured = dict(state_dict["measured"])


class GradientFlow(DepthInstrument):
    """Curves ``gradient_norm/<layer>`` and a heat map over depth and time, ``figures/gradient_norm``.

    The gradients are those that the optimizer gets, after accumulation and unscaling, before Lightning clips them. With
    several optimizers each layer is measured when its own optimizer steps.

    Args:
        every_n_steps: measure once every n batches that step, >= 1; None: the trainer's ``log_every_n_steps``.
        max_layers: draw curves of at most so many layers, >= 1, evenly spaced in depth, the first and the last included: 7
            is how many colours TensorBoard's charts have. The heat map has them all.
        columns: of the heat map, >= 2: at most so many measurements are kept, evenly spaced in time.
        budget: share of the training time that drawing after an epoch may take, in (0, 1); None: draw after every epoch.
            At the end it is drawn in any case.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: no logger; FSDPStrategy or DeepSpeedStrategy, under which gradients lie in pieces.

    In a YAML: ``- class_path: torchcalc.instruments.GradientFlow``.

    >>> GradientFlow(every_n_steps=10).max_layers
    7
    """

    group, title = "gradient_norm", "gradient norm"

    @guarded
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, if it is time to."""
        if not self.due(trainer, optimizer):
            return
        layers = self.layers_of(pl_module, optimizer)
        scale = loss_scale(trainer, optimizer)
        found = norms({name: [p.grad for p in each if p.grad is not None] for name, each in layers.items()})
        self.record(trainer, pl_module, {name: norm / scale for name, norm in found.items()})


def thinned(layers: list[str], count: int) -> set[str]:
    """At most ``count`` of the layers, evenly spaced, the first and the last included."""
    if len(layers) <= count:
        return set(layers)
    if count == 1:
        return {layers[-1]}
    return {layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)}


def loss_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """What the gradients are still multiplied by: GradScaler's scale, for optimizers that divide by it in their step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
