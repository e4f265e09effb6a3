"""The loss of a LightningModule as a plain function of a batch: what curvature, landscapes and range tests need.

``training_step`` is what knows the loss, but it also logs and updates metrics. Here it does neither: ``log`` is silenced, and
the states of torchmetrics are put back. Whatever else it changes, on ``self`` or elsewhere, it changes here too; a module
whose ``training_step`` does so, or that optimizes manually, can name another method.

Of several processes one evaluates, while the others wait for it. A collective operation in ``training_step`` would wait for
them in turn, for ever: it is an error instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric

__all__ = ["Objective", "batch_of", "check_objective"]

LOGS = ("log", "log_dict")


class Objective(nn.Module):
    """``Objective(module)(batch)`` is the loss of the batch, a scalar tensor with its graph.

    Args:
        module: the LightningModule.
        method: the name of a method that takes a batch, and if it wants to, as Lightning's steps, ``batch_idx`` and
            ``dataloader_idx``, which are 0 here; it returns the loss or a dict with it under "loss".

    Raises:
        ValueError: when called, if the method returns no scalar tensor.
        RuntimeError: when called, if the method communicates with other processes.
    """

    def __init__(self, module: LightningModule, method: str = "training_step") -> None:
        super().__init__()
        self.module, self.method = module, method
        self.watched = False  # the first evaluation is: they are alike, and watching costs time

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        step = getattr(self.module, self.method)
        batch_idx = [0] * is_param_in_hook_signature(step, "batch_idx", min_args=2)  # as Lightning's training loop
        dataloader_idx = (
            {"dataloader_idx": 0} if is_param_in_hook_signature(step, "dataloader_idx", explicit=True) else {}
        )
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        watch = Alone(f"{type(self.module).__name__}.{self.method}") if several and not self.watched else nullcontext()
        with silent(self.module), watch:
            found = step(batch, *batch_idx, **dataloader_idx)
        self.watched = True
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"{type(self.module).__name__}.{self.method} returned {what}: it must return a scalar loss"
            )
        return loss.reshape(())


class Alone(TorchDispatchMode):
    """Refuse collective operations inside: nobody answers them."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self.who = who

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, unless it is one of torch.distributed."""
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(
                f"{self.who} calls {func}, which waits for the other processes, but one measures alone: communicate in "
                "on_train_batch_start, or name a method that does not: objective='...'"
            )
        return func(*args, **(kwargs or {}))


def no_target(output: Tensor, target: object) -> Tensor:
    """The loss of what is a loss already, for functions that take ``loss(output, target)``."""
    return output


def check_objective(name: str, trainer: Trainer, module: LightningModule, method: str) -> None:
    """Refuse, before training, what keeps rank zero from evaluating the loss of a batch by itself."""
    if type(trainer.strategy).__name__ == "ModelParallelStrategy":
        raise MisconfigurationException(
            f"{name}: under ModelParallelStrategy no rank has the weights; use DDP or leave it out"
        )
    if trainer.world_size > 1 and any(isinstance(each, nn.SyncBatchNorm) for each in module.modules()):
        raise MisconfigurationException(
            f"{name}: SyncBatchNorm waits for all ranks, but rank zero measures alone; leave it out"
        )
    if not callable(getattr(module, method, None)):
        raise MisconfigurationException(f"{name}: objective={method!r}: {type(module).__name__} has no such method")
    if method == "training_step" and not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name}: with manual optimization training_step takes steps of its own; "
            f"name a method of the module that returns the loss of a batch: {name}(objective='...')"
        )


@contextmanager
def silent(module: LightningModule) -> Iterator[None]:
    """Let the module's methods neither log nor update metrics."""
    metrics = [
        (each, vars(each).copy(), each._copy_state_dict()) for each in module.modules() if isinstance(each, Metric)
    ]
    own = {name: vars(module)[name] for name in LOGS if name in vars(module)}
    for name in LOGS:
        object.__setattr__(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in LOGS:
            object.__delattr__(module, name)
        for name, function in own.items():
            object.__setattr__(module, name, function)
        for metric, attributes, states in metrics:
            vars(metric).clear()
            vars(metric).update(attributes)
            for name, state in states.items():
                setattr(metric, name, state)


def batch_of(batch: Any, examples: int | None = None) -> Any:
    """A detached copy of a batch, on its device; of the first examples only, if a number is given.

    The number of examples in a batch is the first dimension of its first tensor; tensors with another one stay whole.
    """
    size = next((t.shape[0] for t in tensors_in(batch) if t.dim()), 0)

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            cut = examples is not None and value.dim() and value.shape[0] == size
            return (value[:examples] if cut else value).detach().clone()
        if isinstance(value, Mapping):
            return {key: copy(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            copies = [copy(each) for each in value]
            return type(value)(*copies) if hasattr(value, "_fields") else type(value)(copies)
        return value

    with torch.no_grad():
        return copy(batch)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)
