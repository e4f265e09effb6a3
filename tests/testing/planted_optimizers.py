"""Plain optimizers that are right, with a switch for each slip that authors make."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class PlainAdam(torch.optim.Optimizer):
    """Adam, loop over tensors; AdamW with decoupled_weight_decay."""

    slip = ""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        self.kept: dict[Tensor, Tensor] = {}
        self.calls = 0
        super().__init__(
            params,
            dict(
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                decoupled_weight_decay=decoupled_weight_decay,
                maximize=maximize,
            ),
        )
        self.first_group = dict(self.param_groups[0])
        if self.slip in ("amp: state updated", "amp: step counted", "amp: not unscaled"):
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.slip == "group added before it is checked" and not self.param_groups[-1]["lr"] >= 0:
            raise ValueError("Invalid learning rate")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        slip = self.slip
        stale = [[p.grad for p in group["params"]] for group in self.param_groups]
        if closure is not None:
            with torch.set_grad_enabled(slip != "closure without grad"):
                loss = closure()
        with torch.no_grad():
            self.calls += 1
            for group, olds in zip(self.param_groups, stale, strict=True):
                if slip == "step kept in the group":
                    group["step"] = group.get("step", 0) + 1
                for p, old in zip(group["params"], olds, strict=True):
                    g = old if slip == "gradient read before the closure" else p.grad
                    if g is None and slip == "None is zero":
                        g = torch.zeros_like(p)
                    if g is not None:
                        self.update(p, g, group)
        if slip == "grad mode left off":
            torch.set_grad_enabled(False)
        return None if slip == "loss not returned" else loss

    def new_state(self, p: Tensor) -> dict[str, Any]:
        dtype = torch.float32 if self.slip == "state in float32" else p.dtype
        m, v = (torch.zeros_like(p, dtype=dtype) for _ in range(2))
        return {"step": torch.tensor(0.0), "exp_avg": m, "exp_avg_sq": v}

    def update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        slip = self.slip
        if slip == "group options ignored":
            group = self.first_group
        lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
        if slip == "lr cached":
            lr = self.defaults["lr"]
        b1, b2 = reversed(group["betas"]) if slip == "betas swapped" else group["betas"]
        if g.is_sparse:
            raise RuntimeError("PlainAdam does not support sparse gradients")
        state = self.state[p]
        if not state:
            state.update(self.new_state(p))
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if slip == "slot outside of the state":
            m = self.kept.setdefault(p, torch.zeros_like(p))
            state.pop("exp_avg", None)
            state.setdefault("exp_avg", 0.0)

        bad = bool(getattr(self, "found_inf", None))
        if hasattr(self, "grad_scale") and self.grad_scale is not None and slip != "amp: not unscaled":
            g = g / self.grad_scale
        if bad and slip == "amp: state updated":
            m.lerp_(torch.zeros_like(g), 1 - b1)
            m.add_(0.1)
        if bad and slip == "amp: step counted":
            state["step"] += 1
        if bad:
            return

        if group["maximize"] and slip != "maximize ignored":
            g = -g
        if slip == "p.grad written":
            g.mul_(0.999)
        decoupled = group["decoupled_weight_decay"] != (slip == "coupled for decoupled")
        if decay and not decoupled:
            if slip == "maximize turns the decay round" and group["maximize"]:
                g = g - decay * p
            elif slip == "p.grad decayed":
                g = g.add_(p, alpha=decay)
            else:
                g = g + decay * p
        elif decay and slip != "decay after the step":
            p.mul_(1 - (decay if slip == "decay without lr" else lr * decay))
        if slip == "gradient read from memory":
            g = g.clone().as_strided(g.shape, p.contiguous().stride())
        state["step"] += 1
        t = self.calls if slip == "one step count for all" else float(state["step"])
        if slip == "step kept in the group":
            t = group["step"]
        m.lerp_(g.to(m.dtype), 1 - b1)
        v.mul_(b2)
        v.add_(g.to(v.dtype) * g.to(v.dtype), alpha=1 - b2) if slip == "square of complex" else v.add_(
            _square(g.to(v.dtype)), alpha=1 - b2
        )
        shift = {"step counted early": 1, "step counted late": -1}.get(slip, 0)
        c1, c2 = (1 - b ** max(t + shift, 1) for b in (b1, b2))
        if slip in ("no bias correction", "no first bias correction"):
            c1 = 1.0
        if slip in ("no bias correction", "no second bias correction"):
            c2 = 1.0
        root = _root(v / c2 + eps) if slip == "eps inside" else _root(v / c2) + eps
        if slip == "no root":
            root = v / c2 + eps
        if slip == "eps before bias correction":
            root = (_root(v) + eps) / c2**0.5
        rate = {"lr applied twice": lr * lr, "sign": -lr, "lr ignored": 1e-2}.get(slip, lr)
        delta = -rate * _over(m / c1, root)
        if slip == "noise":
            delta = delta * (1 + 1e-3 * random.random())
        self.write(p, delta.to(p.dtype))
        if decay and decoupled and slip == "decay after the step":
            p.mul_(1 - lr * decay)

    def write(self, p: Tensor, delta: Tensor) -> None:
        slip = self.slip
        if slip == "dense memory assumed" and p.dim() > 1 and not p.is_contiguous():
            memory = p.as_strided((p.numel(),), (1,))
            memory.add_(delta.contiguous().flatten()[: memory.numel()])
        elif slip == "new memory":
            p.data = p + delta
        elif slip == "p.data":
            p.data.add_(delta)
        elif slip == "tail left out" and p.dtype == torch.bfloat16:
            n = p.numel() // 2 // 8 * 8
            p.view(-1)[:n].add_(delta.view(-1)[:n])
        elif slip == "empty tensors" and not p.numel():
            raise RuntimeError("max(): Expected reduction dim")
        else:
            p.add_(delta)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.slip == "loading pops":
            state_dict["state"].pop(0, None)
        if self.slip == "any groups are loaded":
            state_dict = copy.deepcopy(state_dict)
            state_dict["param_groups"] = self.state_dict()["param_groups"]
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "kept": self.kept, "calls": self.calls, "first_group": self.first_group}
        if self.slip == "state not pickled":
            state["state"] = type(self.state)(dict)
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.slip == "zero_grad does nothing":
            return
        super().zero_grad(set_to_none)


def _square(g: Tensor) -> Tensor:
    return torch.view_as_complex(torch.view_as_real(g) ** 2) if g.is_complex() else g * g


def _root(v: Tensor) -> Tensor:
    return torch.view_as_complex(torch.view_as_real(v).sqrt()) if v.is_complex() else v.sqrt()


def _over(m: Tensor, root: Tensor) -> Tensor:
    if not m.is_complex():
        return m / root
    # ε was added to the real part only: add it to the other here
    re, im = torch.view_as_real(m).unbind(-1)
    below = torch.view_as_real(root)
    return torch.complex(re / below[..., 0], im / (below[..., 1] + 1e-8))


class PlainSGD(torch.optim.Optimizer):
    """SGD with momentum; foreach and differentiable exist."""

    slip = ""

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum and no dampening")
        super().__init__(
            params,
            dict(
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
                foreach=foreach,
                differentiable=differentiable,
            ),
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if self.slip == "closure twice":
                with torch.enable_grad():
                    closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                for i, p in enumerate(group["params"]):
                    if p.grad is not None:
                        self.update(i, p, p.grad, group)
        return loss

    def update(self, i: int, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        slip, momentum, decay = self.slip, group["momentum"], group["weight_decay"]
        if g.is_sparse and slip == "duplicates not summed":
            dense = torch.zeros_like(p)
            dense[g._indices()[0]] = g._values()
            g = dense
        elif g.is_sparse:
            g = g.to_dense()
        if slip == "gradient scaled in place":
            g.mul_(1.0)
        g = -g if group["maximize"] else g
        if decay and slip not in ("decay after momentum", "decay decoupled"):
            g = g + decay * p
        if decay and slip == "decay decoupled":
            p.mul_(1 - group["lr"] * decay)
        d = g
        if momentum:
            owner = group["params"][0] if slip == "one buffer for all" else p
            state = self.state[owner]
            first = "momentum_buffer" not in state or state["momentum_buffer"].shape != p.shape
            keep = 1 - momentum if slip == "momentum averages" else 1 - group["dampening"]
            if first:
                damped = slip in ("first step damped", "momentum averages")
                b = g * (keep if damped else 1)
                if slip == "buffer detached":
                    b = b.detach()
            else:
                b = momentum * state["momentum_buffer"] + keep * g
            state["momentum_buffer"] = b
            d = b
            if group["nesterov"]:
                d = momentum * b if slip == "nesterov without the gradient" else g + momentum * b
            if group["nesterov"] and slip == "nesterov ignored":
                d = b
        if decay and slip == "decay after momentum":
            d = d + decay * p
        if group["foreach"] and slip == "foreach halves":
            d = d * 0.5
        p.add_(-group["lr"] * d)


def planted(base: type[torch.optim.Optimizer], slip: str) -> type[torch.optim.Optimizer]:
    """The optimizer with a slip; in this module, so that it can be pickled."""
    name = f"{base.__name__}: {slip}".replace(" ", "_")
    if name not in globals():
        globals()[name] = type(name, (base,), {"slip": slip, "__module__": __name__})
    return globals()[name]


class HooksTwice(PlainSGD):
    """step calls super().step(), which torch wraps for hooks as well once there is an instance of the base class."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        PlainSGD([torch.nn.Parameter(torch.zeros(1))])
        super().__init__(params, lr)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


class SwallowsErrors(PlainSGD):
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        try:
            return super().step(closure)
        except Exception:
            return None
