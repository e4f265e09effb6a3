"""Right but unusual optimizers whose elements step by themselves: noise, averages, clamps, precisions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Base(torch.optim.Optimizer):
    """The loop that all share; ``update`` is the rule of one parameter."""

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr={lr}: give a finite number of at least 0")
        super().__init__(params, dict(lr=lr, **options))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        if p.grad.is_sparse:
                            raise RuntimeError("it takes no sparse gradients")
                        self.update(p, p.grad, group)
        return loss

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        p.add_(g, alpha=-group["lr"])

    def slots(self, p: Tensor, *names: str) -> list[Tensor]:
        """State tensors of the parameter's shape, zero at first, and the step, which is counted here."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state.update({name: torch.zeros_like(p) for name in names})
        state["step"] += 1
        return [state[name] for name in names]


class SGLD(Base):
    """Stochastic gradient Langevin dynamics: noise of variance 2·lr·T."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        p.add_(g, alpha=-group["lr"])
        p.add_(torch.randn_like(p), alpha=(2 * group["lr"] * 1e-3) ** 0.5)


class KeepsZeros(Base):
    """zero_grad writes zeros and keeps the tensors, as torch did before 2.0."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=False)


class ScheduleFree(Base):
    """Schedule-free SGD: gradients at y, between the average x and the iterate z; it steps in train mode only."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, lr, momentum=momentum)
        self.training = False

    def train(self) -> None:
        self.training = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self.training:
            raise RuntimeError("optimizer is not in train mode: call optimizer.train() first")
        return super().step(closure)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, z=p.clone(), x=p.clone())
        state["step"] += 1
        state["z"].add_(g, alpha=-group["lr"])
        state["x"].lerp_(state["z"], 1 / state["step"])
        p.copy_(state["z"].lerp(state["x"], group["momentum"]))


class SignSGD(Base):
    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        p.add_(g.sgn() if g.is_complex() else g.sign(), alpha=-group["lr"])


class AdaBelief(Base):
    def __init__(self, params: Any, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(params, lr, betas=betas, eps=eps)

    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        m, v = self.slots(p, "exp_avg", "exp_avg_var")
        b1, b2 = group["betas"]
        m.lerp_(g, 1 - b1)
        v.mul_(b2).add_((g - m) * (g - m), alpha=1 - b2).add_(group["eps"])
        t = float(self.state[p]["step"])
        return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if g.is_complex():
            raise RuntimeError("it takes no complex parameters")
        p.add_(self.direction(p, g, group), alpha=-group["lr"])


class Yogi(AdaBelief):
    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        m, v = self.slots(p, "exp_avg", "exp_avg_sq")
        b1, b2 = group["betas"]
        m.lerp_(g, 1 - b1)
        v.sub_((v - g * g).sign() * g * g, alpha=1 - b2)
        t = float(self.state[p]["step"])
        return (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])


class Clamped(AdaBelief):
    """Sophia's way: the ratio of two averages, clamped to ±1."""

    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        m, h = self.slots(p, "exp_avg", "hessian")
        b1, b2 = group["betas"]
        m.lerp_(g, 1 - b1)
        h.lerp_(g * g, 1 - b2)
        return (m / (20 * h).clamp(min=group["eps"])).clamp(-1, 1)


class WeightAverage(Base):
    """SGD that keeps an exponential average of the weights beside them."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        p.add_(g, alpha=-group["lr"])
        state = self.state[p]
        if not state:
            state["ema"] = p.clone()
        state["ema"].lerp_(p, 0.01)


class Accumulates(Base):
    """Steps by the mean of every two gradients."""

    def __init__(self, params: Any, lr: float = 0.1, every: int = 2) -> None:
        super().__init__(params, lr, every=every)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(count=0, total=torch.zeros_like(p))
        state["count"] += 1
        state["total"].add_(g)
        if state["count"] % group["every"] == 0:
            p.add_(state["total"], alpha=-group["lr"] / group["every"])
            state["total"].zero_()


class WarmsUp(Base):
    """Momentum, with lr rising over the first steps."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9, warmup_steps: int = 7) -> None:
        super().__init__(params, lr, momentum=momentum, warmup_steps=warmup_steps)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        (b,) = self.slots(p, "momentum_buffer")
        b.mul_(group["momentum"]).add_(g)
        p.add_(b, alpha=-group["lr"] * min(1.0, float(self.state[p]["step"]) / group["warmup_steps"]))


class RelativeStep(Base):
    """Adafactor's way: no lr is given, it follows from the step."""

    def __init__(self, params: Any, lr: float | None = None) -> None:
        super().__init__(params, 0.0)
        for group in self.param_groups:
            group["lr"] = lr
        self.defaults["lr"] = lr

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        (v,) = self.slots(p, "exp_avg_sq")
        t = float(self.state[p]["step"])
        v.lerp_((g * g.conj()), t**-0.8)
        rate = group["lr"] if group["lr"] is not None else min(1e-2, t**-0.5)
        p.sub_((rate * g / (v.sqrt() + 1e-15)).to(p.dtype))


class OnlyFloat32(Base):
    """Momentum as a kernel of one dtype has it; others are refused."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if p.dtype != torch.float32:
            raise TypeError(f"it takes float32, not {p.dtype}")
        (b,) = self.slots(p, "momentum_buffer")
        p.add_(b.mul_(0.9).add_(g), alpha=-group["lr"])


class MasterWeights(Base):
    """Steps in float32 at least, and rounds the parameter."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        wide = torch.promote_types(p.dtype, torch.float32)
        master = self.state[p].setdefault("master", p.to(wide, copy=True))
        p.copy_(master.add_(g.to(wide), alpha=-group["lr"]))


class OwnNoise(Base):
    """Noise from a generator of its own, which starts anew when it is copied."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.generator = torch.Generator().manual_seed(1)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        p.add_(g, alpha=-group["lr"])
        p.add_(torch.randn(p.shape, generator=self.generator, dtype=p.dtype), alpha=1e-3)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.generator = torch.Generator().manual_seed(1)


class Proximal(Base):
    """A step, and the proximal map of the L1 norm."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        p.add_(g, alpha=-group["lr"])
        p.copy_(p.sgn() * (p.abs() - 1e-3 * group["lr"]).clamp(min=0))


class Flat(torch.optim.Optimizer):
    """Momentum of a whole group in one buffer."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        if p.grad.is_sparse:
                            raise RuntimeError("it takes no sparse gradients")
                        flat = self.state[p].setdefault("flat", torch.zeros(p.numel(), dtype=p.dtype))
                        flat.mul_(group["momentum"]).add_(p.grad.reshape(-1))
                        p.sub_(group["lr"] * flat.reshape(p.shape))
        return loss
