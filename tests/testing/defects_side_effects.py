"""Functions that are right, and do something beside: to generators, settings, containers, buffers, gradients, hooks."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tests.testing.defects import Defect, classic, saving
from tests.testing.right import normal

x = normal(3, 4)
history: list[float] = []
counts: dict[int, int] = {}
parameter = nn.Parameter(torch.ones(3))


def doing(act: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """sin, after act."""

    def fn(a: Tensor) -> Tensor:
        act(a)
        return a.sin()

    return fn


def in_backward(act: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """sin, whose backward does act."""

    def backward(ctx: Any, g: Tensor) -> Tensor:
        act(g)
        return g * ctx.saved_tensors[0].cos()

    return classic(saving(torch.sin), backward)


def write_grad(g: Tensor) -> None:
    parameter.grad = torch.ones(3)


def count(g: Tensor) -> None:
    counts[len(counts)] = 1


def hook(a: Tensor) -> None:
    if a.requires_grad:
        a.register_hook(lambda g: None)


def closure() -> Callable[[Tensor], Tensor]:
    kept: list[Tensor] = []
    return doing(lambda a: kept.append(a.detach()))


def a_longer_tensor() -> Callable[[Tensor], Tensor]:
    state = {"seen": torch.zeros(0)}

    def act(a: Tensor) -> None:
        state["seen"] = torch.cat([state["seen"], a.detach().reshape(-1)[:1].float()])

    return doing(act)


class Module(nn.Module):
    def __init__(self, act: Callable[[Module, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.seen: list[float] = []
        self.act = act

    def forward(self, a: Tensor) -> Tensor:
        self.act(self, a)
        return self.linear(a)


class Buffered(torch.autograd.Function):
    """Returns one buffer as the gradient of every call."""

    buffer = torch.empty(0)

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        if Buffered.buffer.shape != a.shape or Buffered.buffer.dtype != a.dtype:
            Buffered.buffer = torch.empty_like(a)
        return torch.mul(g, a.cos(), out=Buffered.buffer)


def buffer_of_closure() -> Callable[..., Tensor]:
    kept: dict[Any, Tensor] = {}

    def backward(ctx: Any, g: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        out = kept.setdefault((a.shape, a.dtype), torch.empty_like(a))
        return torch.mul(g, a.cos(), out=out)

    return classic(saving(torch.sin), backward)


def d(name: str, fn: Any, cause: str, verdict: str = "error") -> Defect:
    return Defect(name, fn, (x,), "side effects", cause, verdict)


DEFECTS_BESIDE = [
    d("reseeds torch", doing(lambda a: torch.manual_seed(0)), "reseeds torch's generator"),
    d("reseeds NumPy", doing(lambda a: numpy.random.seed(0)), "reseeds NumPy's generator"),
    d("reseeds Python in backward", in_backward(lambda g: random.seed(0)), "reseeds Python's generator"),
    d("reseeds and draws", lambda a: (torch.manual_seed(1), a * torch.rand(()))[1], "reseeds torch's generator"),
    d("consumes torch's", in_backward(lambda g: torch.rand(3)), "consumes torch's generator"),
    d("consumes NumPy's", doing(lambda a: numpy.random.rand(3)), "consumes NumPy's generator"),
    d("consumes Python's", doing(lambda a: random.random()), "consumes Python's generator"),
    d("default dtype", doing(lambda a: torch.set_default_dtype(torch.float64)), "changes the default dtype"),
    d("deterministic", doing(lambda a: torch._C._set_deterministic_algorithms(True)), "changes deterministic algorithms"),
    d("grad mode", doing(lambda a: torch.set_grad_enabled(False)), "changes grad mode"),
    d("anomaly", doing(lambda a: torch.autograd.set_detect_anomaly(True)), "changes anomaly detection"),
    d("threads", doing(lambda a: torch.set_num_threads(2)), "changes the number of threads"),
    d("autocast", doing(lambda a: torch.set_autocast_enabled("cpu", True)), "changes autocast"),
    d("matmul precision", doing(lambda a: torch.set_float32_matmul_precision("medium")), "changes the precision of float32"),
    d("NumPy's errors", doing(lambda a: numpy.seterr(all="ignore")), "changes NumPy's error handling"),
    d("appends to a global", doing(lambda a: history.append(0.0)), "grows a container"),
    d("appends in backward", in_backward(count), "grows a container"),
    d("appends to a closure", closure(), "grows a container"),
    d("appends to a module", Module(lambda m, a: m.seen.append(0.0)), "grows a container"),
    d("a tensor that grows", a_longer_tensor(), "grows a container"),
    d("buffer of a class", Buffered.apply, "returns its own buffer as gradient"),
    d("buffer of a closure", buffer_of_closure(), "returns its own buffer as gradient"),
    d("eval mode", Module(lambda m, a: m.eval()), "changes train mode"),
    d("patches torch", doing(lambda a: setattr(torch, "sinh", torch.cosh)), "changes functions of torch"),
    d("another's gradient", in_backward(write_grad), "writes .grad"),
    d("hook on the input", doing(hook), "leaves hooks"),
    d("hook on a module", Module(lambda m, a: m.linear.register_forward_hook(lambda *_: None)), "leaves hooks"),
    d("hook on all modules", doing(lambda a: nn.modules.module.register_module_forward_hook(lambda *_: None)),
      "changes hooks of all modules"),
    d("hooks of saved tensors", doing(lambda a: saved_tensors_hooks(lambda t: t, lambda t: t).__enter__()),
      "changes the hooks of saved tensors"),
    d("environment", doing(lambda a: os.environ.update(A_PLANTED_NAME="1")), "changes the environment"),
    d("filters of warnings", doing(lambda a: warnings.filterwarnings("ignore", "planted")), "changes the filters of warnings"),
    d("level of logging", doing(lambda a: logging.disable(logging.CRITICAL)), "changes the level of logging"),
    d("denormals", doing(lambda a: torch.set_flush_denormal(True)), "changes the flushing of denormal numbers"),
    d("recursion limit", doing(lambda a: sys.setrecursionlimit(12345)), "changes the recursion limit"),
]  # fmt: skip
