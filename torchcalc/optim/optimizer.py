"""The one driver of all optimizers: it owns the loop, the state, and what can go wrong; a subclass supplies the rule.

A *rule* is a static function ``rule(p, g, **slots, t, **hyper)`` of the formula alone. It writes to p and to its
slots (the state that has the parameter's shape), never to g. Written with the algebra of
:mod:`torchcalc.optim.tensor_list`, the same body runs on one tensor and on a list. A subclass names its slots and
hyperparameters and checks them; the driver does the rest: closures, lazily made state, parameters without a gradient
or with a first one late, groups, buckets of tensors that go together, complex and sparse tensors, shards of DTensors,
state in another dtype than its parameter, GradScaler, autograd through the step.

Which way a step goes, group by group:

=====================================  =================================================================================
``foreach=False`` (or fused=False)     tensor by tensor; equal to torch's loop to the last bit
``foreach=True``; default on CUDA      one ``torch._foreach_*`` call per operation of the rule and bucket
``fused=True`` on CUDA                 torch's fused kernel where the class has one, else as foreach
``differentiable=True``                tensor by tensor, out of place, recorded by autograd
otherwise (default and fused on CPU)   tensor by tensor
=====================================  =================================================================================
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchcalc.optim.checkpoint import load_state_dict
from torchcalc.optim.checks import warn_of_misspelling
from torchcalc.optim.tensor_list import TensorList

__all__ = ["Optimizer", "ParamsT"]

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Entry(NamedTuple):
    """One parameter that has a gradient."""

    p: Tensor
    g: Tensor
    slots: list[Tensor]
    state: dict[str, Any]
    first: bool  # its state was made just now


class Optimizer(torch.optim.Optimizer):
    """Base class: subclass it with a rule. See :class:`torchcalc.optim.Lion` for the shortest example."""

    rule: ClassVar[Callable[..., None]]
    sparse_rule: ClassVar[Callable[..., None] | None] = None
    sparse_error: ClassVar[str] = ""
    counts_steps: ClassVar[bool] = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self.check(defaults)
        super().__init__(params, defaults)
        if defaults.get("fused"):  # only then: with it Lightning refuses gradient_clip_val under 16-mixed
            self._step_supports_amp_scaling = True

    # What a subclass says.

    def check(self, group: dict[str, Any]) -> None:
        """Raise if a hyperparameter of the group is out of range."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's keyword arguments."""
        raise NotImplementedError

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        """The rule's slots, and the state keys where they are kept."""
        raise NotImplementedError

    def new_slot(self, key: str, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        """A slot at its parameter's first step."""
        return torch.zeros_like(p, memory_format=torch.preserve_format)

    def advance(
        self, state: dict[str, Any], group: dict[str, Any], hyper: dict[str, Any], first: bool
    ) -> dict[str, Any]:
        """Count the step; return the rule's arguments that differ between parameters. first: the slots are new."""
        if not self.counts_steps:
            return {}
        state["step"] += 1
        return {"t": read(state["step"], group)}

    # The driver.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked like the constructor's arguments.

        The dict passed in is copied. A tensor lr that another group holds is copied too, so that each has its own.
        """
        if isinstance(param_group, dict):
            warn_of_misspelling(param_group, self.defaults)
            param_group = {**self.defaults, **param_group}
            self.check(param_group)
            lr = param_group["lr"]
            if isinstance(lr, Tensor) and not lr.requires_grad and any(lr is g["lr"] for g in self.param_groups):
                param_group["lr"] = lr.clone()
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        if self.defaults.get("fused"):
            self._step_supports_amp_scaling = True

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer or of its torch twin; see :mod:`torchcalc.optim.checkpoint`."""
        load_state_dict(self, state_dict)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step()
        return loss

    def _step(self) -> None:
        grad_scale = getattr(self, "grad_scale", None)  # GradScaler lends these two for the time of a fused step
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        entries = [self._entries(group) for group in self.param_groups]
        for group, group_entries in zip(self.param_groups, entries, strict=True):
            if group_entries:
                self._step_group(group, group_entries, grad_scale)

    def _entries(self, group: dict[str, Any]) -> list[Entry]:
        """The parameters with a gradient, with their state; raises before any state is made."""
        params = [p for p in group["params"] if p.grad is not None]
        if self.sparse_rule is None and any(p.grad.is_sparse for p in params):
            raise RuntimeError(self.sparse_error)
        if group.get("capturable") and not torch.compiler.is_compiling():
            check_capturable(params)
        keys = self.slots(group).values()
        entries = []
        for p in params:
            state = self.state[p]
            missing = [key for key in keys if state.get(key) is None]
            if self.counts_steps and "step" not in state:
                state["step"] = new_step(p, group)
            for key in missing:
                state[key] = self.new_slot(key, p, p.grad, group)
            entries.append(Entry(p, p.grad, [state[key] for key in keys], state, first=bool(missing)))
        return entries

    def _step_group(self, group: dict[str, Any], entries: list[Entry], grad_scale: Tensor | None) -> None:
        hyper = self.hyper(group)
        hyper["lr"] = to_scalar(hyper["lr"])
        as_lists = goes_foreach(group, entries)
        buckets: dict[Any, list[tuple[list[Tensor], dict[str, Any]]]] = {}
        for e in entries:
            scalars = self.advance(e.state, group, hyper, e.first)
            if group["differentiable"]:
                self._step_recorded(group, e, {**hyper, **scalars})
                continue
            tensors = local_shards([e.p, e.g, *e.slots])
            if as_lists and not e.g.is_sparse and len({t.dtype for t in tensors}) == 1:
                numbers = tuple(None if isinstance(s, Tensor) else s for s in scalars.values())
                buckets.setdefault((e.p.device, e.p.dtype, numbers), []).append((tensors, scalars))
            else:
                self._step_one(group, tensors, {**hyper, **scalars}, grad_scale)
        for bucket in buckets.values():
            lists = [TensorList(ts) for ts in zip(*(tensors for tensors, _ in bucket), strict=True)]
            scalars = {k: stack([scalars[k] for _, scalars in bucket]) for k in bucket[0][1]}
            self._apply(group, lists, {**hyper, **scalars}, grad_scale)

    def _apply(
        self, group: dict[str, Any], tensors: list[Any], args: dict[str, Any], grad_scale: Tensor | None
    ) -> None:
        """Call the rule on [p, g, *slots], tensors or TensorLists; g unscaled first, and negated to ascend."""
        p, g, *slots = tensors
        if grad_scale is not None:
            g = g.div(grad_scale)
        if group["maximize"]:
            g = -g
        rule = self.sparse_rule if isinstance(g, Tensor) and g.is_sparse and self.sparse_rule else self.rule
        rule(p, g, **dict(zip(self.slots(group), slots, strict=True)), **args)

    def _step_one(
        self, group: dict[str, Any], tensors: list[Tensor], args: dict[str, Any], grad_scale: Tensor | None
    ) -> None:
        """One parameter; where its state has another dtype (loaded, say), in the widest, rounded once at the end."""
        if all(t.dtype == tensors[0].dtype for t in tensors):
            return self._apply(group, tensors, args, grad_scale)
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
        wide = [t.to(dtype) for t in tensors]
        self._apply(group, wide, args, grad_scale)
        for t, new in zip(tensors, wide, strict=True):
            if new is not t and t is not tensors[1]:
                t.copy_(new)

    def _step_recorded(self, group: dict[str, Any], e: Entry, args: dict[str, Any]) -> None:
        """differentiable=True: autograd needs the old values, so the rule works on copies, which become the state."""
        p, slots = e.p.clone(), [s.clone() for s in e.slots]
        self._apply(group, local_shards([p, e.g, *slots]), args, None)
        e.p.copy_(p)
        e.state.update(zip(self.slots(group).values(), slots, strict=True))


# Parts of the driver that need nothing of it.


def to_scalar(x: Any) -> Any:
    """A 1-element tensor as a 0-dimensional one."""
    return x.squeeze() if isinstance(x, Tensor) and x.dim() != 0 else x


def read(scalar: Tensor, group: dict[str, Any]) -> Any:
    """A scalar of the state as a number; as a tensor where reading it would cost a synchronisation or a graph."""
    return scalar if group.get("capturable") or torch.compiler.is_compiling() else scalar.item()


def stack(scalars: list[Any]) -> Any:
    return TensorList(scalars) if isinstance(scalars[0], Tensor) else scalars[0]


def new_scalar(value: float, p: Tensor, group: dict[str, Any]) -> Tensor:
    """A scalar of the state: on the host, unless a kernel or a graph on the device reads it. torch's dtypes."""
    fused = group.get("fused")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32
    return torch.tensor(value, dtype=dtype, device=p.device if group.get("capturable") or fused else "cpu")


def new_step(p: Tensor, group: dict[str, Any]) -> Tensor:
    return new_scalar(0.0, p, group)


def check_capturable(params: list[Tensor]) -> None:
    from torch.optim.optimizer import _get_capturable_supported_devices

    supported = _get_capturable_supported_devices()
    for p in params:
        if p.device.type not in supported:
            raise AssertionError(
                f"If capturable=True, params and state_steps must be on supported devices: {supported}.; "
                f"a parameter is on {p.device}: pass capturable=False"
            )


def goes_foreach(group: dict[str, Any], entries: list[Entry]) -> bool:
    if group["differentiable"]:
        return False
    if group["foreach"] is None and (group.get("fused") or group.get("fused") is None):
        tensor_lr = isinstance(group["lr"], Tensor) and not group.get("capturable")
        return not tensor_lr and all(e.p.is_cuda for e in entries)
    return bool(group["foreach"])


def local_shards(tensors: list[Tensor]) -> list[Tensor]:
    """p, g and slots; as local shards where all are sharded alike, since rules are elementwise."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensors[0], distributed.DTensor):
        placements = tensors[0].placements
        if not all(isinstance(t, distributed.DTensor) and t.placements == placements for t in tensors):
            return tensors
        if any(placement.is_partial() for placement in placements):
            return tensors
        tensors = [t._local_tensor for t in tensors]  # type: ignore[attr-defined]
    return tensors
