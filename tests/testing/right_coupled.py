"""Right but unusual optimizers that look at a whole tensor, at all of them, at the loss, or at another optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.testing.right_elementwise import AdaBelief, Base


class LARS(Base):
    """A step of the length of the parameter, by momentum."""

    def __init__(self, params: Any, lr: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__(params, lr, momentum=momentum)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        (b,) = self.slots(p, "momentum_buffer")
        size, slope = p.norm(), g.norm()
        trust = torch.where((size > 0) & (slope > 0), size / slope, 1.0).to(p.dtype)
        b.mul_(group["momentum"]).add_(g * trust * group["lr"])
        p.sub_(b)


class LAMB(Base):
    """Adam's direction, of the length of the parameter."""

    def __init__(self, params: Any, lr: float = 0.02, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-6):
        super().__init__(params, lr, betas=betas, eps=eps)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        m, v = self.slots(p, "exp_avg", "exp_avg_sq")
        b1, b2 = group["betas"]
        m.lerp_(g, 1 - b1)
        v.lerp_(g * g, 1 - b2)
        t = float(self.state[p]["step"])
        d = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        size, slope = p.norm(), d.norm()
        p.sub_(d * torch.where((size > 0) & (slope > 0), size / slope, 1.0).to(p.dtype) * group["lr"])


class Shampoo(Base):
    """Preconditioners for rows and columns, by eigenvalues; the roots are renewed every few steps."""

    def __init__(self, params: Any, lr: float = 0.1, eps: float = 1e-4, update_freq: int = 3) -> None:
        super().__init__(params, lr, eps=eps, update_freq=update_freq)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if not p.numel():
            return
        state = self.state[p]
        matrix = g.reshape(g.shape[0], -1) if g.dim() > 1 else g.reshape(-1, 1)
        matrix = matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix
        sides = (matrix @ matrix.mT.conj(), matrix.mT.conj() @ matrix)
        if not state:
            state["step"] = 0
            state["sums"] = [group["eps"] * torch.eye(len(s), dtype=s.dtype) for s in sides]
        for total, s in zip(state["sums"], sides, strict=True):
            total.add_(s)
        if state["step"] % group["update_freq"] == 0:
            state["roots"] = [self.root(total) for total in state["sums"]]
        state["step"] += 1
        left, right = state["roots"]
        p.add_((left @ matrix @ right).reshape(p.shape).to(p.dtype), alpha=-group["lr"])

    @staticmethod
    def root(x: Tensor) -> Tensor:
        if not bool(x.isfinite().all()):
            return torch.full_like(x, torch.nan)
        values, vectors = torch.linalg.eigh(x)
        return (vectors * values.clamp(min=1e-30) ** -0.25) @ vectors.mT.conj()


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer; every k steps the slow weights follow the fast ones half way."""

    def __init__(self, params: Any, lr: float = 0.1, k: int = 5) -> None:
        self.inner = torch.optim.SGD(params, lr=lr, momentum=0.9, foreach=False)
        super().__init__(self.inner.param_groups, {**self.inner.defaults, "k": k})
        self.inner.param_groups = self.param_groups
        self.inner.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.detach().clone())
        loss = self.inner.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    state["count"] = state.get("count", 0) + 1
                    if state["count"] % group["k"] == 0:
                        state["slow"].lerp_(p, 0.5)
                        p.copy_(state["slow"])
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inner": self.inner}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.inner.param_groups, self.inner.state = self.param_groups, self.state


class SAM(Base):
    """Sharpness-aware: the gradient at p + ρ·g/‖g‖; it needs a closure."""

    def __init__(self, params: Any, lr: float = 0.1, rho: float = 0.05) -> None:
        super().__init__(params, lr, rho=rho)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            raise RuntimeError("SAM needs a closure")
        with torch.enable_grad():
            loss = closure()
        live = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        old = [p.detach().clone() for p, _ in live]
        if live:
            norm = torch.stack([p.grad.norm() for p, _ in live]).norm()  # type: ignore[union-attr]
            with torch.no_grad():
                for p, group in live:
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)).to(p.dtype))
            with torch.enable_grad():
                closure()
        with torch.no_grad():
            for (p, group), start in zip(live, old, strict=True):
                p.copy_(start)
                p.add_(p.grad, alpha=-group["lr"])  # type: ignore[arg-type]
        return loss


class NormalizedGD(Base):
    """One norm over all parameters."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
            if grads:
                if any(g.is_sparse for g in grads):
                    raise RuntimeError("it takes no sparse gradients")
                norm = torch.stack([g.norm() for g in grads]).norm() + 1e-12
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            p.add_((p.grad / norm).to(p.dtype), alpha=-group["lr"])
        return loss


class Cautious(AdaBelief):
    """Adam that leaves out what goes against the gradient, and makes up for it."""

    def direction(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        m, v = self.slots(p, "exp_avg", "exp_avg_sq")
        b1, b2 = group["betas"]
        m.lerp_(g, 1 - b1)
        v.lerp_(g * g, 1 - b2)
        t = float(self.state[p]["step"])
        d = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        mask = (d * g > 0).to(d.dtype)
        return d * mask / mask.mean().clamp(min=1e-3) if d.numel() else d


class Centralized(Base):
    """Gradients of matrices lose their mean over the inputs."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if g.dim() > 1 and g.numel():
            g = g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True)
        p.add_(g, alpha=-group["lr"])


class DAdaptation(Base):
    """Its step size grows from sums over all parameters (D-adaptation, lr = 1)."""

    def __init__(self, params: Any, lr: float = 1.0, d0: float = 1e-2) -> None:
        super().__init__(params, lr, d0=d0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                d = group.get("d", group["d0"])
                live = [p for p in group["params"] if p.grad is not None]
                if any(p.grad.is_sparse or p.grad.is_complex() for p in live):  # type: ignore[union-attr]
                    raise RuntimeError("it takes dense real gradients")
                top = group.get("numerator", 0.0)
                for p in live:
                    g: Any = p.grad
                    state = self.state[p]
                    if not state:
                        state.update(s=torch.zeros_like(p), v=torch.zeros_like(p))
                    top += d * group["lr"] * float((g * state["s"]).sum())
                    state["s"].add_(g, alpha=d * group["lr"])
                    state["v"].add_(g * g)
                below = sum(float(self.state[p]["s"].abs().sum()) for p in live)
                group["numerator"] = top
                group["d"] = max(d, top / below) if below > 0 else d
                for p in live:
                    root = self.state[p]["v"].sqrt() + 1e-8
                    p.sub_(d * group["lr"] * p.grad / root)  # type: ignore[operator]
        return loss


class Greedy(Base):
    """Moves the element with the largest gradient only (Gauss-Southwell)."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if g.numel():
            p.sub_(torch.where(g.abs() == g.abs().max(), g, 0 * g), alpha=group["lr"])


class BlockQuantized(Base):
    """Momentum kept in 8 bits, with one scale for each block of 64."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, lr, momentum=momentum)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if g.is_complex():
            raise RuntimeError("it takes no complex parameters")
        if not g.numel():
            return
        state = self.state[p]
        b = g.reshape(-1).to(torch.promote_types(g.dtype, torch.float32))
        if state:
            b = b + group["momentum"] * (state["codes"] * state["scales"][:, None]).reshape(-1)[: p.numel()]
        p.sub_((group["lr"] * b).reshape(p.shape).to(p.dtype))
        blocks = torch.nn.functional.pad(b, (0, -b.numel() % 64)).reshape(-1, 64)
        state["scales"] = blocks.abs().amax(1).clamp(min=1e-38) / 127
        state["codes"] = (blocks / state["scales"][:, None]).round().nan_to_num(0).to(torch.int8)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which makes floats of the codes
        for state in self.state.values():
            state["codes"] = state["codes"].to(torch.int8)


class PolyakStep(Base):
    """The step length comes from the value of the loss, whose lower bound is given."""

    def __init__(self, params: Any, lr: float = 1.0, lower: float = -1e3) -> None:
        super().__init__(params, lr, lower=lower)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            raise RuntimeError("it needs a closure that returns the loss")
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            live = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
            square = sum(float(p.grad.abs().square().sum()) for p, _ in live)  # type: ignore[union-attr]
            for p, group in live:
                gap = max(float(loss) - group["lower"], 0.0)
                p.add_(p.grad, alpha=-group["lr"] * min(gap / max(square, 1e-12), 0.05))  # type: ignore[arg-type]
        return loss


class Private(Base):
    """DP-SGD: the gradient's norm is at most 1, and noise is added."""

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        g = g / g.norm().clamp(min=1).to(g.dtype)
        p.add_(g + 1e-2 * torch.empty_like(g).normal_(), alpha=-group["lr"])


class LowRank(Base):
    """GaLore's way: the gradient's part in its two largest directions, which are renewed every ten steps."""

    def __init__(self, params: Any, lr: float = 0.1, update_proj_gap: int = 10) -> None:
        super().__init__(params, lr, update_proj_gap=update_proj_gap)

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        if g.dim() > 1 and g.numel():
            (u,) = (self.state[p].get("u"),)
            count = self.state[p].get("count", 0)
            matrix = g.reshape(g.shape[0], -1).to(torch.promote_types(g.dtype, torch.float32))
            if u is None or count % group["update_proj_gap"] == 0:
                u = torch.linalg.svd(matrix, full_matrices=False)[0][:, :2] if bool(g.isfinite().all()) else matrix
            self.state[p].update(u=u, count=count + 1)
            g = (u @ (u.mH @ matrix)).reshape(g.shape).to(p.dtype)
        p.add_(g, alpha=-group["lr"])
