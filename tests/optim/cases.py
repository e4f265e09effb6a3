"""One row per optimizer. The checks in this folder run over all rows: a new optimizer is one row more."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchcalc.optim as ours
from tests.reference import optim as reference


@dataclass(frozen=True)
class Case:
    cls: type[torch.optim.Optimizer]
    #: The optimizer of torch that it replaces; None where torch has none, then the float64 reference speaks.
    twin: type[torch.optim.Optimizer] | None
    configs: tuple[dict[str, Any], ...]
    reference: Callable[..., Any] | None = None
    sparse: bool = False

    @property
    def name(self) -> str:
        return self.cls.__name__

    def takes(self, option: str) -> bool:
        """Whether the constructor knows the option."""
        return option in inspect.signature(self.cls).parameters


def tensor(x: float) -> Tensor:
    return torch.tensor(x)


CASES = (
    Case(
        ours.SGD,
        torch.optim.SGD,
        (
            dict(lr=0.1),
            dict(lr=0.1, momentum=0.9),
            dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
            dict(lr=0.1, momentum=0.9, nesterov=True, maximize=True),
            dict(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
            dict(lr=tensor(0.1), weight_decay=tensor(0.1), momentum=0.5),
        ),
        sparse=True,
    ),
    Case(
        ours.Adam,
        torch.optim.Adam,
        (
            dict(lr=0.01),
            dict(lr=0.01, weight_decay=0.1, amsgrad=True),
            dict(lr=0.01, betas=(0.5, 0.9), eps=1e-3, maximize=True),
            dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
            dict(lr=torch.tensor([0.01]), weight_decay=0.1),
            dict(lr=tensor(0.01), betas=(tensor(0.8), tensor(0.9)), amsgrad=True),
        ),
    ),
    Case(
        ours.AdamW,
        torch.optim.AdamW,
        (
            dict(lr=0.01),
            dict(lr=0.01, betas=(0.0, 0.9), weight_decay=0.3, amsgrad=True, maximize=True),
            dict(lr=tensor(0.01)),
        ),
    ),
    Case(
        ours.RMSprop,
        torch.optim.RMSprop,
        (
            dict(lr=0.01),
            dict(lr=0.01, alpha=0.9, momentum=0.9, centered=True, weight_decay=0.1, eps=1e-3),
            dict(lr=0.01, centered=True, eps=1e-2, maximize=True),
            dict(lr=tensor(0.01), momentum=0.5),
        ),
    ),
    Case(
        ours.Adagrad,
        torch.optim.Adagrad,
        (
            dict(lr=0.1),
            dict(lr=0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.3, maximize=True),
            dict(lr=tensor(0.1), lr_decay=0.1),
        ),
        sparse=True,
    ),
    Case(
        ours.NAdam,
        torch.optim.NAdam,
        (
            dict(lr=0.01),
            dict(lr=0.01, weight_decay=0.1, momentum_decay=0.1, maximize=True),
            dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
            dict(lr=tensor(0.01), betas=(0.7, 0.9)),
        ),
    ),
    Case(
        ours.RAdam,
        torch.optim.RAdam,
        (
            dict(lr=0.01),
            dict(lr=0.01, betas=(0.9, 0.9), weight_decay=0.1, maximize=True),
            dict(lr=0.01, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1, decoupled_weight_decay=True),  # ρ∞ = 4
            dict(lr=tensor(0.01)),
        ),
    ),
    Case(
        ours.Adamax,
        torch.optim.Adamax,
        (
            dict(lr=0.01),
            dict(lr=0.01, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1, maximize=True),
            dict(lr=tensor(0.01)),
        ),
    ),
    Case(
        ours.Adadelta,
        torch.optim.Adadelta,
        (
            dict(lr=0.1),
            dict(lr=1.0, rho=0.5, eps=1e-3, weight_decay=0.1, maximize=True),
            dict(lr=tensor(0.1)),
        ),
    ),
    Case(
        ours.ASGD,
        torch.optim.ASGD,
        (
            dict(lr=0.1),
            dict(lr=0.1, lambd=0.1, alpha=0.5, t0=3, weight_decay=0.1, maximize=True),
            dict(lr=tensor(0.1), lambd=0.1, t0=0),
        ),
    ),
    Case(
        ours.Rprop,
        torch.optim.Rprop,
        (
            dict(lr=0.01),
            dict(lr=0.01, etas=(0.3, 1.7), step_sizes=(1e-3, 0.02), maximize=True),
            dict(lr=tensor(0.01)),
        ),
    ),
    Case(
        ours.Lion,
        None,
        (
            dict(lr=0.01),
            dict(lr=0.01, betas=(0.5, 0.7), weight_decay=0.1, maximize=True),
            dict(lr=tensor(0.01), betas=(tensor(0.5), tensor(0.7))),
        ),
        reference=reference.lion,
    ),
    Case(
        ours.GradientDescent,
        None,
        (dict(lr=0.1), dict(lr=tensor(0.1), maximize=True)),
        reference=reference.gradient_descent,
        sparse=True,
    ),
)
TWINS = tuple(case for case in CASES if case.twin is not None)

#: State that is one number for each parameter, whatever the parameter's dtype.
NUMBERS = ("step", "mu_product", "eta", "mu")

#: Without a CUDA device its rows are left out; test_parity.py has one skipped test that says so.
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def spelled(config: dict[str, Any]) -> str:
    def value(x: Any) -> str:
        if isinstance(x, tuple):
            return "(" + ",".join(map(value, x)) + ")"
        return f"tensor{x.tolist()}" if isinstance(x, Tensor) else str(x)

    return ",".join(f"{k}={value(v)}" for k, v in config.items()) or "defaults"


def each(cases: tuple[Case, ...] = CASES) -> Any:
    """Parametrize a test by ``case``."""
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def each_config(cases: tuple[Case, ...] = CASES, *, keep: Callable[[dict[str, Any]], bool] = lambda _: True) -> Any:
    """Parametrize a test by ``case`` and ``config``."""
    rows = [
        pytest.param(case, config, id=f"{case.name}({spelled(config)})")
        for case in cases
        for config in case.configs
        if keep(config)
    ]
    return pytest.mark.parametrize(("case", "config"), rows)


def options_of(case: Case, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The ways of a step that torch allows with this config, beside its loop."""
    yield {}
    if case.takes("foreach") and not (has_tensors(config) and issubclass(case.cls, ours.Adam)):
        yield dict(foreach=True)  # torch's Adam refuses it with tensors: test_errors.py
    for option in ("fused", "capturable"):
        if case.takes(option):
            yield {option: True}


def each_path(cases: tuple[Case, ...] = CASES) -> Any:
    """Parametrize a test by ``case``, ``config``, ``options`` and ``device``."""
    rows = [
        pytest.param(case, config, options, device, id=f"{case.name}({spelled(config)})-{spelled(options)}-{device}")
        for case in cases
        for config in case.configs
        for options in options_of(case, config)
        for device in DEVICES
        if not (device == "cpu" and "capturable" in options)
    ]
    return pytest.mark.parametrize(("case", "config", "options", "device"), rows)


def has_tensors(config: dict[str, Any]) -> bool:
    return any(isinstance(x, Tensor) for v in config.values() for x in (v if isinstance(v, tuple) else (v,)))


def build(cls: type[torch.optim.Optimizer], params: Any, config: dict[str, Any], **options: Any) -> Any:
    """An optimizer with hyperparameters of its own, so that tensors are not shared between ours and torch's."""
    return cls(params, **copy.deepcopy(config), **options)


# Parameters and gradients.

SHAPES: tuple[tuple[int, ...], ...] = ((3, 4), (5,), (), (0, 2), (2, 3, 2, 3))


def parameters(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    seed: int = 0,
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype).to(device)) for s in shapes]


def gradients(like: list[nn.Parameter], steps: int, seed: int = 1, missing: bool = True) -> list[list[Tensor | None]]:
    """Gradients of every step; each parameter misses every fifth, and the second gets its first one at step 7."""
    generator = torch.Generator().manual_seed(seed)

    def one(step: int, i: int, p: Tensor) -> Tensor | None:
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        return None if missing and ((step + i) % 5 == 0 or (i == 1 and step < 7)) else g

    return [[one(step, i, p) for i, p in enumerate(like)] for step in range(steps)]


def set_gradients(params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    """Every parameter with a copy of its gradient: an optimizer that wrote to one would not change another's run."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()


def run(
    optimizer: torch.optim.Optimizer, grads: list[list[Tensor | None]], after: Callable[[], None] | None = None
) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in grads:
        set_gradients(params, step)
        optimizer.step()
        if after is not None:
            after()


# Comparisons.


def leaves(x: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested dicts and lists, in the order of the paths."""
    if isinstance(x, dict):
        for key in sorted(x, key=str):
            yield from leaves(x[key], f"{path}.{key}")
    elif isinstance(x, (list, tuple)):
        for i, item in enumerate(x):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, x


def same(a: Any, b: Any) -> None:
    """Assert that two trees hold the same, tensors to the last bit and of one dtype, nan equal to itself."""
    flat_a, flat_b = dict(leaves(a)), dict(leaves(b))
    assert flat_a.keys() == flat_b.keys()
    for path, x in flat_a.items():
        y = flat_b[path]
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            assert isinstance(x, Tensor), path
            assert isinstance(y, Tensor), path
            assert x.dtype == y.dtype, path
            torch.testing.assert_close(
                x.detach(), y.detach(), rtol=0, atol=0, equal_nan=True, msg=lambda m, at=path: f"{at}: {m}"
            )
        else:
            assert x == y, path


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """All that a step may change, copied."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy({"params": params, "optimizer": optimizer.state_dict()})


def ulp(x: Tensor) -> Tensor:
    """The distance from |x| to the next number of its format, in float64; that of the smallest normal one below it."""
    info = torch.finfo(x.dtype)
    exponent = torch.frexp(x.detach().double().abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent)
