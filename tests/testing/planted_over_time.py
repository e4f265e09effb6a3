"""Optimizers that are right at first, or for usual sizes, and wrong later, or for others; and what they do besides."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.testing.planted_optimizers import PlainAdam, PlainSGD

__all__ = ["OVER_TIME"]


def gradient(change: Callable[[Tensor], Tensor], base: Any = PlainAdam) -> Any:
    """The optimizer with its gradients changed on the way in."""

    class Changed(base):  # type: ignore[misc]
        def update(self, *args: Any) -> None:
            *rest, p, g, group = args
            super().update(*rest, p, change(g), group)

    return Changed


def group(change: Callable[[dict[str, Any]], dict[str, Any]], base: Any = PlainAdam) -> Any:
    """The optimizer with its options changed on the way in."""

    class Changed(base):  # type: ignore[misc]
        def update(self, *args: Any) -> None:
            *rest, options = args
            super().update(*rest, {**options, **change(options)})

    return Changed


def counted(event: Callable[[Any, Tensor, dict[str, Any], int], None]) -> Any:
    """Adam that does something to a parameter's state before each step but the first."""

    class Eventful(PlainAdam):
        def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
            state = self.state[p]
            if state:
                event(self, p, state, round(float(state["step"])))
            super().update(p, g, group)

    return Eventful


def stops_correcting(self: Any, p: Tensor, state: dict[str, Any], t: int) -> None:
    self.slip = "no bias correction" if t >= 10 else ""


def moments_reset(self: Any, p: Tensor, state: dict[str, Any], t: int) -> None:
    if t % 20 == 0:
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()


def state_reset(self: Any, p: Tensor, state: dict[str, Any], t: int) -> None:
    if t == 50:
        state.clear()


def nan_later(self: Any, p: Tensor, state: dict[str, Any], t: int) -> None:
    if t == 500:
        p.fill_(torch.nan)


def second_moment_capped(self: Any, p: Tensor, state: dict[str, Any], t: int) -> None:
    state["exp_avg_sq"].clamp_(max=10.0)


def lr_drops(self: Any, p: Tensor, state: dict[str, Any], t: int) -> None:
    if t == 300:
        self.param_groups[0]["lr"] *= 0.5


class Wraps(PlainAdam):
    def new_state(self, p: Tensor) -> dict[str, Any]:
        return {**super().new_state(p), "step": torch.tensor(0, dtype=torch.int8)}


class CountsInHalf(PlainAdam):
    def new_state(self, p: Tensor) -> dict[str, Any]:
        return {**super().new_state(p), "step": torch.tensor(0, dtype=torch.bfloat16)}


class StopsAt4096(PlainAdam):
    def write(self, p: Tensor, delta: Tensor) -> None:
        p.view(-1)[:4096].add_(delta.reshape(-1)[:4096])


class LastBlock(PlainAdam):
    def write(self, p: Tensor, delta: Tensor) -> None:
        n = p.numel() if p.numel() < 1024 else p.numel() // 1024 * 1024
        p.view(-1)[:n].add_(delta.reshape(-1)[:n])


class SkipsZeros(PlainAdam):
    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if bool(g.any()):
            super().update(p, g, group)


class SkipsZeroElements(PlainAdam):
    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        before = p.clone()
        super().update(p, g, group)
        p.copy_(torch.where(g == 0, before, p))


class KeepsGradient(PlainSGD):
    """Momentum whose first buffer is p.grad itself."""

    def update(self, i: int, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        b = group["momentum"] * state["momentum_buffer"] + g if state else g
        state["momentum_buffer"] = b
        p.add_(b, alpha=-group["lr"])


class OnlyTrainable(PlainAdam):
    """Takes those parameters that require grad when it is made."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        self.live = {id(p) for group in self.param_groups for p in group["params"] if p.requires_grad}

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if id(p) in self.live:
            super().update(p, g, group)


def before_each(act: Callable[[], Any]) -> Any:
    class Acts(PlainAdam):
        def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
            act()
            super().update(p, g, group)

    return Acts


class Logs(PlainAdam):
    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        self.__dict__.setdefault("log", []).append(g.norm())
        super().update(p, g, group)


class AliasesStart(PlainSGD):
    """Pulls towards where the parameter started, which it forgot to copy."""

    def update(self, i: int, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        start = self.state[p].setdefault("start", p.detach())
        p.add_(g + 0.1 * (p - start), alpha=-group["lr"])


class LosesTheFirst(PlainSGD):
    def update(self, i: int, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if self.state[p].setdefault("seen", False):
            super().update(i, p, g, group)
        self.state[p]["seen"] = True


class ForgetsAtANewLr(PlainAdam):
    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if state.get("lr", group["lr"]) != group["lr"]:
            state["exp_avg"] = torch.zeros_like(p)
        super().update(p, g, group)
        state["lr"] = group["lr"]


class FirstDtype(PlainSGD):
    """Steps in the dtype of the first parameter."""

    def update(self, i: int, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        super().update(i, p, g.to(group["params"][0].dtype).to(p.dtype), group)


class RowsOf128(PlainSGD):
    def update(self, i: int, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if p.dim() == 2:
            g = torch.cat([g[:128], torch.zeros_like(g[128:])])
        super().update(i, p, g, group)


#: (name, class, reference, options, check, verdict, part of the cause)
OVER_TIME: tuple[tuple[str, Any, Any, dict[str, Any], str, str, str], ...] = tuple(
    (name, cls, getattr(torch.optim, "SGD" if issubclass(cls, PlainSGD) else "Adam"), options, check, verdict, cause)
    for name, cls, options, check, verdict, cause in (
        ("a correction that stops at step 10", counted(stops_correcting), {}, "long run", "error", "from step 11 on"),
        ("moments reset every 20", counted(moments_reset), {}, "long run", "error", "from step 21 on"),
        ("moments reset every 20, seen by itself", counted(moments_reset), {}, "steady", "note", "every 20 steps"),
        ("state starts anew", counted(state_reset), {}, "long run", "error", "state starts anew at step 51"),
        ("a count that wraps at 127", Wraps, {}, "long run", "error", "a count of 8 bits ends there"),
        ("a count that wraps at 127, seen by itself", Wraps, {}, "steady", "note", "the count of steps wraps or stops"),
        ("a count in bfloat16", CountsInHalf, {}, "steady", "note", "the count of steps wraps or stops"),
        ("nan after 500", counted(nan_later), {}, "long run", "error", "not finite from step 501 on"),
        ("nan after 500, seen by itself", counted(nan_later), {}, "steady", "error", "not finite from step 501 on"),
        ("second moment capped", counted(second_moment_capped), {}, "long run", "error", "wrong from step"),
        ("lr that drops at 300", counted(lr_drops), {}, "long run", "error", "from step 301 on"),
        ("gradients below 1e-6 dropped", gradient(lambda g: torch.where(g.abs() < 1e-6, 0 * g, g)), {},
         "gradient sizes", "error", "1e-30 to 1e-07: elements unchanged"),
        ("gradients clamped at 5", gradient(lambda g: g.clamp(-5, 5), PlainSGD), {}, "gradient sizes", "error",
         "1e+01 to 1e+30"),
        ("nan_to_num", gradient(torch.nan_to_num), {}, "nan gradients", "error", "nan taken for a number"),
        ("lr floor", group(lambda o: {"lr": max(o["lr"], 1e-6)}), {}, "lr sizes", "error", "lr=1e-06"),
        ("lr cap", group(lambda o: {"lr": min(o["lr"], 1.0)}), {}, "lr sizes", "error", "lr=1"),
        ("zero gradients skip", SkipsZeros, {}, "zero gradients", "error", "a gradient of zero is skipped"),
        ("zero elements skip", SkipsZeroElements, {}, "zero gradients", "error", "a gradient of zero"),
        ("elements beyond 4,096", StopsAt4096, {}, "large tensors", "error", "elements from 4096 on stand still"),
        ("the last block", LastBlock, {}, "large tensors", "error", "stand still"),
        ("p.grad kept as state", KeepsGradient, dict(momentum=0.9), "gradient memory", "error", "p.grad kept as state"),
        ("the parameter kept as state", AliasesStart, {}, "gradient memory", "note", "shares the parameter's memory"),
        ("unfreezing", OnlyTrainable, {}, "unfreezing", "error", "frozen at first never moves"),
        ("reseeds torch", before_each(lambda: torch.manual_seed(0)), {}, "side effects", "error", "seeds torch's"),
        ("reseeds NumPy", before_each(lambda: np.random.seed(0)), {}, "side effects", "error", "seeds NumPy's"),
        ("reseeds Python", before_each(lambda: random.seed(0)), {}, "side effects", "error", "seeds Python's"),
        ("draws without need", before_each(lambda: torch.rand(1)), {}, "side effects", "note", "draws from torch's"),
        ("default dtype", before_each(lambda: torch.set_default_dtype(torch.float64)), {}, "side effects", "error",
         "changes the default dtype"),
        ("deterministic algorithms", before_each(lambda: torch.use_deterministic_algorithms(True)), {}, "side effects",
         "error", "changes deterministic algorithms"),
        ("matmul precision", before_each(lambda: torch.set_float32_matmul_precision("medium")), {}, "side effects",
         "error", "changes the precision of float32 matmul"),
        ("first step lost", LosesTheFirst, {}, "steady", "note", "the first step does nothing"),
        ("a new lr ends the momentum", ForgetsAtANewLr, {}, "changed lr", "note", "a new lr changes what is remembered"),
        ("dtype of the first parameter", FirstDtype, {}, "mixed dtypes", "error", ""),
        ("rows beyond 128", RowsOf128, {}, "large tensors", "error", "stand still"),
        ("noise", gradient(lambda g: g + 1e-5 * torch.randn_like(g)), {}, "side effects", "note", "its steps have noise"),
        ("a log that grows", Logs, {}, "steady", "note", "grows with every step"),
    )
)  # fmt: skip
