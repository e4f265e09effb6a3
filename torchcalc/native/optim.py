"""The optimizer kernels, called from Python. Ask `torchcalc.native.available()` before anything here.

A step has the meaning of torch.optim's formulas and returns a status:

- `DONE`: parameters, state and steps are updated. Gradients are never written to.
- `UNSUPPORTED`: nothing was touched. Some tensor is not a dense CPU tensor, or a parameter, its gradient and its state have
  different sizes or strides, or dtypes without a kernel, or overlap. The Python rule takes it.

Dtypes: gradients have their parameter's; state has the parameter's, or float32 for bfloat16 and float16 parameters; `steps`
are one-element float32 or float64 tensors. float32 and the half types compute in float32, float64 in float64.

The options of all steps:

- `grad_scale`: a GradScaler's tensor. The gradient is multiplied by 1/grad_scale, as `unscale_` does.
- `grad_coef`: it is multiplied by this number, e.g. the clip coefficient from `grad_norm`; by both in one product.
- `seed`: bfloat16 and float16 parameters are rounded stochastically, with bits that depend only on the seed, a parameter's
  place in the list, and an element's place in it. None rounds to nearest.

Every result has the same bits for any number of threads. In float32 and float64 a step has the bits of torch.optim's loop
of tensor operations (foreach=False) on a processor with fused multiply-adds, but for one thing: our square roots are
correctly rounded, and torch's are not everywhere (MKL's on AMD). Half types compute in float32 and round what is stored,
once, as torch's fused kernels do.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DONE", "UNSUPPORTED", "Bound", "GradNorm", "grad_norm"]

UNSUPPORTED = 0
DONE = 1

# Kernels write where autograd does not see it: backward through a graph that saved the old weights must raise, as with torch.
_written = torch._C._increment_version


class Bound:
    """Parameters with their optimizer state, held by the library from step to step.

    Handing five lists of tensors to an operator costs more than a small model's step itself; a bound step hands over the
    gradients only. What tensors hold may change between steps (`p.data = ...`, `resize_`, `to`): all checks run at every
    step. Which tensor objects they are may not: bind again when the optimizer's state holds others.

    Args:
        params: the parameters.
        state: for Adam all exp_avg, then all exp_avg_sq, then for amsgrad all max_exp_avg_sq; for SGD with momentum all
            momentum buffers; for SGD without it, nothing.
        steps: for Adam the step counts, which the kernel increments.

    Copying and pickling bind the copied tensors.
    """

    __slots__ = ("__weakref__", "_adam", "_handle", "_rule", "_sgd", "params", "state", "steps")

    def __init__(self, params: Sequence[Tensor], state: Sequence[Tensor], steps: Sequence[Tensor] = ()) -> None:
        self.params, self.state, self.steps = list(params), list(state), list(steps)
        ops = torch.ops.torchcalc
        self._adam, self._sgd, self._rule = ops.adam_bound_.default, ops.sgd_bound_.default, ops.rule_bound_.default
        try:
            with torch.no_grad():
                self._handle: int = ops.bind.default(self.params, self.state, self.steps)
        except (RuntimeError, NotImplementedError):  # tensors that torch does not hand to kernels as they are
            self._handle = 0  # no group has this number: every step is UNSUPPORTED, every place refused
        else:
            weakref.finalize(self, ops.unbind.default, self._handle).atexit = False

    def __reduce__(self) -> tuple[object, ...]:
        return Bound, (self.params, self.state, self.steps)

    def refused(self, grads: Sequence[Tensor]) -> list[int]:
        """The places of those parameters that no kernel takes, as they, their gradients and their state are."""
        if not self._handle:
            return list(range(len(self.params)))
        places: list[int] = torch.ops.torchcalc.refused.default(self._handle, grads)
        return places

    def adam_(
        self,
        grads: Sequence[Tensor],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        maximize: bool = False,
        grad_coef: float = 1.0,
        grad_scale: Tensor | None = None,
        seed: int | None = None,
    ) -> int:
        """One step of Adam, or of AdamW if `decoupled`; returns the status."""
        status: int = self._adam(
            self._handle, grads, lr, beta1, beta2, eps, weight_decay, decoupled, maximize, grad_coef, grad_scale, seed
        )  # fmt: skip
        if status == DONE:
            _written(self.params)
        return status

    def sgd_(
        self,
        grads: Sequence[Tensor],
        *,
        first: Sequence[int] = (),
        lr: float,
        momentum: float,
        dampening: float,
        weight_decay: float,
        nesterov: bool,
        maximize: bool = False,
        grad_coef: float = 1.0,
        grad_scale: Tensor | None = None,
        seed: int | None = None,
    ) -> int:
        """One step of SGD; returns the status.

        `first`: the places of those parameters whose momentum buffer is set to the gradient in this step, whatever it holds.
        """
        status: int = self._sgd(
            self._handle, grads, first, lr, momentum, dampening, weight_decay, nesterov, maximize, grad_coef, grad_scale,
            seed,
        )  # fmt: skip
        if status == DONE:
            _written(self.params)
        return status

    def rule_(
        self,
        grads: Sequence[Tensor],
        *,
        hash: int,
        counts: bool,
        scalars: Sequence[float],
        shared: Sequence[float],
        maximize: bool = False,
        grad_coef: float = 1.0,
        grad_scale: Tensor | None = None,
        seed: int | None = None,
    ) -> int:
        """One step of the rule whose recording has this hash; returns the status.

        The rule's numbers are, in its recording's order: the step count if the kernel `counts` steps; `scalars`, as many for each
        tensor, tensor by tensor; and those that all tensors share.
        """
        status: int = self._rule(
            self._handle, grads, hash, counts, scalars, shared, maximize, grad_coef, grad_scale, seed
        )
        if status == DONE:
            _written(self.params)
        return status


class GradNorm(NamedTuple):
    """The sum of the squares of all elements, in float64, and whether each of them is finite.

    `finite` is not the finiteness of `squared`: squares of float64 gradients overflow from 1e154 on.
    """

    squared: float
    finite: bool


def grad_norm(grads: Sequence[Tensor]) -> GradNorm | None:
    """‖g‖² over all gradients in one read, the same bits for any number of threads; None if some tensor is unsupported.

    For gradients scaled by a GradScaler divide `squared` by the square of the scale; over shards, sum it.
    """
    supported, squared, finite = torch.ops.torchcalc.grad_norm.default(grads)
    return GradNorm(squared, finite) if supported else None
