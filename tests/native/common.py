"""Tables of hyperparameters, and parameters in the middle of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.native.reference import loop_adam
from torchcalc.native.optim import Bound

ADAM: dict[str, Any] = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=True)
ADAM_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adamw": dict(weight_decay=1e-2),
    "adam with l2": dict(weight_decay=1e-2, decoupled=False),
    "maximize": dict(weight_decay=0.1, maximize=True),
    "large lr and eps": dict(lr=0.3, eps=1e-2, weight_decay=0.1),
    "small betas": dict(beta1=0.3, beta2=0.4),  # 1 − β₁ ≥ 0.5: lerp starts from the other end
    "no momentum": dict(beta1=0.0, beta2=0.9),
    "zero lr": dict(lr=0.0),
}
SGD: dict[str, Any] = dict(lr=1e-2, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False)
SGD_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": dict(lr=0.3, weight_decay=0.1),
    "momentum": dict(momentum=0.9),
    "dampening": dict(momentum=0.9, dampening=0.3, weight_decay=0.2, maximize=True),
    "nesterov": dict(momentum=0.95, nesterov=True, weight_decay=0.01),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FULL = [torch.float32, torch.float64]
# Around every vector width, the unit in which threads split the work, and what one thread takes alone.
SIZES = [0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 127, 128, 129, 1000, 20_000, 40_001]


def named(cases: dict[str, dict[str, Any]]) -> Any:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def bits(t: Tensor) -> Tensor:
    """Equal only for equal bits: -0 is not 0, and NaN is itself."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def exact() -> bool:
    """Whether torch's own loops run on fused multiply-adds, as ours do: otherwise bits cannot be compared with them."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and instruction_set() in ("avx2", "avx512")


def instruction_set() -> str:
    return str(torch.ops.torchcalc.instruction_set())


def assert_near(ours: list[Tensor], loop: list[Tensor], scale: list[Tensor]) -> None:
    """Where there is no fused multiply-add: within four roundings of the largest number that entered."""
    for a, b, s in zip(ours, loop, scale, strict=True):
        ok = (a.double() - b.double()).abs() <= 4 * torch.finfo(a.dtype).eps * s.double().abs()
        assert bool((ok | (a.isnan() & b.isnan())).all())


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    maxima: list[Tensor],
    steps: list[Tensor],
    **options: Any,
) -> int:
    """A step of tensors that are bound for it alone."""
    return Bound(params, [*exp_avgs, *exp_avg_sqs, *maxima], steps).adam_(grads, **options)


def sgd_(params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor], **options: Any) -> int:
    return Bound(params, momentum_buffers).sgd_(grads, **options)


class AdamState:
    """Parameters of several shapes in the middle of training."""

    def __init__(
        self, shapes: list[Any], dtype: torch.dtype, *, amsgrad: bool = False, state_dtype: torch.dtype | None = None
    ) -> None:
        other = state_dtype or dtype
        self.params = [torch.randn(s, dtype=dtype) for s in shapes]
        self.exp_avgs = [torch.randn(s, dtype=other) for s in shapes]
        self.exp_avg_sqs = [torch.rand(s, dtype=other) for s in shapes]
        self.maxima = [torch.rand(s, dtype=other) for s in shapes] if amsgrad else []
        self.steps = [torch.tensor(float(3 + i % 3)) for i in range(len(shapes))]

    def all(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.maxima, *self.steps]

    def grads(self) -> list[Tensor]:
        return [torch.randn_like(p) * 10.0 ** (i % 5 - 2) for i, p in enumerate(self.params)]

    def step(self, grads: list[Tensor], **options: Any) -> int:
        return self.bound().adam_(grads, **{**ADAM, **options})

    def bound(self) -> Bound:
        return Bound(self.params, [*self.exp_avgs, *self.exp_avg_sqs, *self.maxima], self.steps)

    def loop(self, grads: list[Tensor], **options: Any) -> None:
        for i, g in enumerate(grads):
            self.steps[i] += 1
            x = self.maxima[i] if self.maxima else None
            t = self.steps[i].item()
            loop_adam(self.params[i], g, self.exp_avgs[i], self.exp_avg_sqs[i], x, t, **{**ADAM, **options})
