"""Sharpness: the largest curvature of the loss, against the largest learning rate that it lets through.

Along the eigenvector of the Hessian's largest eigenvalue λ gradient descent multiplies the distance by 1 − lr·λ at every
step: with lr > 2/λ it overshoots, farther each time. Read the other way round, the learning rate in use lets through a
sharpness up to 2/lr. Training tends to sharpen the loss until λ is there, and then stays at that edge of stability: in the
chart λ climbs to the threshold and hovers about it. Momentum, weight decay and Adam's preconditioner move the threshold;
:func:`torchcalc.convergence.stability_limit` knows by how much, and for Adam the Hessian is preconditioned as its steps are.

Reference: Cohen et al. 2021, arXiv:2103.00065, and 2022, arXiv:2207.14484 (Adam).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from torchcalc.calculus import TrainingLoss, curvature, training_loss
from torchcalc.convergence import preconditioner, stability_limit
from torchcalc.instruments.instrument import Chart, Instrument, check_at_least_one, guarded
from torchcalc.instruments.objective import Objective, batch_of, check_objective, no_target

__all__ = ["Sharpness", "SharpnessReading", "sharpness"]


BASIS = 4  # Lanczos vectors kept, each as large as all weights


class SharpnessReading(NamedTuple):
    """What :func:`sharpness` found.

    Attributes:
        value: λ, of the Hessian, or of the preconditioned one for an optimizer with a preconditioner.
        limit: the largest stable learning rate at this λ; nan if it is not known for this optimizer; inf if λ <= 0.
        threshold: the largest stable λ at the learning rate in use; nan likewise.
        vector: the eigenvector, by the names of the parameters: where the next measurement starts.
        why: why limit and threshold are not known; else empty.

    >>> SharpnessReading(value=20.0, limit=0.1, threshold=40.0, vector={}).value < 40.0  # below it the step is stable
    True
    """

    value: float
    limit: float
    threshold: float
    vector: dict[str, Tensor]
    why: str = ""


def sharpness(
    loss: TrainingLoss,
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    *,
    start: Mapping[str, Tensor] | None = None,
    tolerance: float = 0.1,
    max_products: int = 4,
) -> SharpnessReading:
    """The largest curvature of a training loss at the present weights, and what it means for this optimizer.

    Args:
        loss: of :func:`torchcalc.calculus.training_loss`.
        optimizer: that trains the parameters; its preconditioner is that of its present state.
        parameters: the model's trainable parameters, by the names that ``loss`` knows them by.
        start: the ``vector`` of the last measurement.
        tolerance: as for :func:`torchcalc.calculus.curvature`; the error of λ is about its square.
        max_products: Hessian-vector products spent at most, >= 1; if they do not suffice, the value is a lower bound.

    Raises:
        ValueError: parameters that ``loss`` does not know, or of which the optimizer trains none; and as
            :func:`torchcalc.calculus.curvature`.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> loss = training_loss(model, nn.functional.mse_loss, (torch.tensor([[3.0]]), torch.tensor([[6.0]])))
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> found = sharpness(loss, sgd, dict(model.named_parameters()))  # the loss (3w − 6)² has f'' = 18
    >>> round(found.value, 3), round(found.limit, 3), round(found.threshold, 3)
    (18.0, 0.111, 20.0)
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in parameters.items() if id(p) in trained and p.requires_grad]
    if not names:
        raise ValueError("optimizer: it trains none of the parameters; make it from those of the loss's model")
    known = loss.names
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"parameters: the loss knows no {', '.join(unknown)}; its own are {', '.join(known)}")
    metric, why = None, ""
    try:
        stability_limit(optimizer, 1.0)
        by_parameter = preconditioner(optimizer)
        metric = {name: positive(by_parameter[parameters[name]]) for name in names}
        if all(bool((m == 1).all()) for m in metric.values()):
            metric = None
        del by_parameter  # as large as all weights
    except (TypeError, ValueError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
    at = {name: parameters[name].detach() for name in names}
    if start is not None and {k: v.shape for k, v in start.items()} != {k: v.shape for k, v in at.items()}:
        start = None  # something was frozen or unfrozen since
    options: dict[str, Any] = dict(tolerance=tolerance, max_products=max_products, basis=BASIS)
    found = curvature(loss, at, metric=metric, start=start, **options)
    limit = threshold = math.nan
    if not why and math.isfinite(found.value):
        limit = stability_limit(optimizer, found.value) if found.value > 0 else math.inf
        near = abs(found.value) or 1.0
        threshold = largest_stable(lambda s: stability_limit(optimizer, s), rate(optimizer), near)
    return SharpnessReading(found.value, limit, threshold, found.vector, why)


def rate(optimizer: Optimizer) -> float:
    """The learning rate in use, of several groups the largest."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def positive(metric: Tensor) -> Tensor:
    """A preconditioner with eps = 0 is zero where no gradient ever was; there the Hessian is zero, too."""
    return metric.clamp_min(torch.finfo(metric.dtype).tiny)


def largest_stable(limit: Callable[[float], float], lr: float, near: float = 1.0) -> float:
    """The sharpness s at which limit(s) = lr; inf for lr = 0, nan if no s > 0 is stable.

    All limits are of the form c/(s + d), so 1/limit is a straight line, known from two points.
    """
    if lr <= 0:
        return math.inf
    if not limit(near) > 0:
        return math.nan
    at, slope = 1 / limit(near), (1 / limit(2 * near) - 1 / limit(near)) / near
    s = near + (1 / lr - at) / slope if slope > 0 else math.nan
    return s if s > 0 else math.nan


class Sharpness(Instrument):
    """Curves of the sharpness, with its threshold and by itself, and of the learning rate and its limit, a chart for each.

    ``sharpness/lambda`` and ``sharpness/threshold``: training is unstable while the former is above the latter.
    ``sharpness/lr`` and ``sharpness/lr_limit``: the same in terms of the learning rate. They are of the loss of one fixed
    batch, the first of the training, with one dropout mask and without autocast; the sharpness of few examples is somewhat
    above that of all. Weights, buffers, metrics, random numbers and ``.grad`` are left as they are; what else
    ``training_step`` does in Python, such as appending to a list, happens once more at each evaluation. A measurement needs the
    memory of about nine copies of the weights, twelve with Adam's preconditioner, and one is kept in between. Under DDP rank zero
    measures, of its own batch, and the others wait: it is switched off where ``training_step`` communicates with them (do that in
    ``on_train_batch_start``). For optimizers that
    :func:`~torchcalc.convergence.stability_limit` does not know, the plain Hessian's λ is all there is.

    Args:
        every_n_steps: at most once every n batches that step, >= 1; None: the trainer's ``log_every_n_steps``.
        budget: share of the training time, in (0, 1), that measurements may take: what a measurement has cost must be
            paid off before the next. None: no limit.
        examples: of the batch, at most so many are used, >= 1; None: all.
        tolerance: as for :func:`torchcalc.calculus.curvature`; the error of λ is about its square.
        max_products: Hessian-vector products per measurement, >= 1, each about two training steps of ``examples``.
        objective: name of the LightningModule's method that takes a batch and returns the loss.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: no logger; several optimizers; no such method, or manual optimization without a method
            that returns the loss; parameters in pieces (ModelParallelStrategy, FSDP, DeepSpeed).

    >>> Sharpness(every_n_steps=100, budget=None).examples
    16
    """

    draws = False

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        budget: float | None = 0.005,
        examples: int | None = 16,
        tolerance: float = 0.1,
        max_products: int = 4,
        objective: str = "training_step",
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, budget=budget)
        check_at_least_one("examples", examples, or_none=True)
        check_at_least_one("max_products", max_products)
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance}: must be between 0 and 1")
        self.examples, self.tolerance, self.max_products = examples, tolerance, max_products
        self.objective = objective
        self.batch: Any = None
        self.vector: dict[str, Tensor] | None = None
        self.ready = False
        self.told: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_objective("Sharpness", trainer, pl_module, self.objective)
            self.batch = self.vector = None
            self.ready, self.measured = False, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if len(trainer.optimizers) > 1:
            raise MisconfigurationException(
                f"Sharpness: there are {len(trainer.optimizers)} optimizers: which loss which of them decreases is not known"
            )

    def charts(self) -> list[Chart]:
        return [
            ("sharpness", "sharpness λ and its threshold", ["^sharpness/(lambda|threshold)$"]),
            ("sharpness", "sharpness λ", ["^sharpness/lambda$"]),  # a threshold far above would flatten it
            ("sharpness", "learning rate and its limit", ["^sharpness/lr(_limit)?$"]),
        ]

    @guarded
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the first batch."""
        if self.batch is None and trainer.is_global_zero:
            self.batch = batch_of(batch, self.examples)

    @guarded
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note whether it is time to measure: after the step, when the optimizer's state is that of the weights."""
        paid = self.budget is None or self.spent <= self.budget * self.elapsed()
        # An optimizer that calls its closure several times comes by several times in a step.
        self.ready = self.ready or (trainer.is_global_zero and paid and self.due(trainer, optimizer))

    @guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure."""
        if self.ready:
            self.ready = False
            with self.spending():
                self.measure(trainer, pl_module)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        loss = training_loss(Objective(pl_module, self.objective), no_target, [((self.batch,), None)])
        parameters = {f"module.{name}": p for name, p in pl_module.named_parameters() if p.requires_grad}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = sharpness(
                loss,
                optimizer,
                parameters,
                start=self.vector,
                tolerance=self.tolerance,
                max_products=self.max_products,
            )
        for message in [str(each.message) for each in caught] + [found.why] * bool(found.why):
            kind = message.partition(":")[0]  # the rest may hold numbers that differ each time
            if kind not in self.told:
                self.told.add(kind)
                rank_zero_warn(f"Sharpness: {message}")
        self.vector = found.vector if math.isfinite(found.value) else None
        values = {"lambda": found.value, "threshold": found.threshold, "lr_limit": found.limit}
        values["lr"] = rate(optimizer)
        self.write_curves(trainer, {f"sharpness/{k}": v for k, v in values.items() if math.isfinite(v)})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the batch and the vector."""
        self.batch = self.vector = None
