"""Steps of optimizers: torch.optim's against torchcalc.optim's, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import torchcalc
from benchmarks.harness import Row, Traffic, interleaved
from benchmarks.memory import MemoryRow
from benchmarks.models import LARGE, SMALL, Shape, elements, gpt

Step = Callable[[], Any]


def parameters(shapes: list[Shape], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same values at every call, with gradients."""
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=generator))
        p.grad = torch.empty(shape, dtype=dtype).uniform_(-1e-2, 1e-2, generator=generator)
        params.append(p)
    return params


def close(stock: list[Tensor], ours: list[Tensor], steps: int) -> None:
    """Raise unless the parameters agree to `steps` roundings of their dtype."""
    for a, b in zip(stock, ours, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(b, a, rtol=steps * eps, atol=steps * eps)


def step_row(
    name: str,
    shapes: list[Shape],
    stock: Callable[[list[Tensor]], Step],
    ours: Callable[[list[Tensor]], Step],
    *,
    dtype: torch.dtype = torch.float32,
    slots: int,
    extra_reads: int = 0,
    **row: Any,
) -> Row:
    """slots: state tensors per parameter, each read and written, as is the parameter; the gradient is read."""

    def make() -> tuple[Step, Step, Callable[[], None]]:
        a, b = parameters(shapes, dtype), parameters(shapes, dtype)
        stock_step, our_step = stock(a), ours(b)

        def same() -> None:
            for _ in range(3):
                stock_step()
                our_step()
            close(a, b, steps=8)

        return stock_step, our_step, same

    size = elements(shapes) * dtype.itemsize
    traffic = Traffic(size, reads=2 + slots + extra_reads, writes=1 + slots) if size >= 2**16 else None
    return Row(name, make=make, traffic=traffic, **row)


def optimizer(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[list[Tensor]], Step]:
    return lambda params: cls(params, **options).step


def clipped(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[list[Tensor]], Step]:
    def make(params: list[Tensor]) -> Step:
        step = cls(params, **options).step

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            step()

        return clip_and_step

    return make


def rows() -> Iterator[Row]:
    torch_adamw, adamw = torch.optim.AdamW, torchcalc.optim.AdamW
    torch_sgd, sgd = torch.optim.SGD, torchcalc.optim.SGD
    momentum = {"lr": 1e-3, "momentum": 0.9}
    for size, shapes, targets in (
        ("small", SMALL, (3.0, 12.0, 2.0, 4.0, 3.5)),
        ("large", LARGE, (0.97, 5.0, 0.97, 1.35, 1.3)),
    ):
        common: dict[str, Any] = {"group": size, "seconds": 5.0 if size == "small" else 20.0, "quick": size == "small"}
        fused = optimizer(torch_adamw, fused=True)
        yield step_row(
            f"null: the same step twice, {size}",
            shapes,
            fused,
            fused,
            slots=2,
            against="itself",
            tolerance=0.05,
            **common,
        )
        yield step_row(
            f"AdamW, {size}",
            shapes,
            fused,
            optimizer(adamw),
            slots=2,
            against="AdamW(fused=True)",
            target=targets[0],
            **common,
        )
        yield step_row(
            f"AdamW, {size}",
            shapes,
            optimizer(torch_adamw),
            optimizer(adamw),
            slots=2,
            against="AdamW()",
            target=targets[1],
            **common,
        )
        yield step_row(
            f"SGD momentum, {size}",
            shapes,
            optimizer(torch_sgd, fused=True, **momentum),
            optimizer(sgd, **momentum),
            slots=1,
            against="SGD(fused=True)",
            target=targets[2],
            **common,
        )
        yield step_row(
            f"clip + AdamW, {size}",
            shapes,
            clipped(torch_adamw, fused=True),
            optimizer(adamw, max_norm=1.0),
            slots=2,
            extra_reads=1,
            against="clip_grad_norm_ + AdamW(fused=True)",
            target=targets[3],
            **common,
        )
        yield step_row(
            f"bf16 AdamW, {size}",
            shapes,
            optimizer(torch_adamw, fused=True),
            optimizer(adamw),
            dtype=torch.bfloat16,
            slots=2,
            against="AdamW(fused=True)",
            target=targets[4],
            **common,
        )
        yield from recorded_rows(size, shapes, common)
    for count, numel in ((1, 1), (1, 1000), (10, 100), (100, 100), (1000, 100), (100, 10_000), (1, 1_000_000)):
        yield step_row(
            f"AdamW, {count} x {numel}",
            [(numel,)] * count,
            optimizer(torch_adamw, fused=True),
            optimizer(adamw),
            slots=2,
            against="AdamW(fused=True)",
            target=0.97,
            group="shapes",
            seconds=2.0,
        )


def recorded_rows(size: str, shapes: list[Shape], common: dict[str, Any]) -> Iterator[Row]:
    """Optimizers whose kernels are made from their rules, against the fastest way of torch's; Lion against its own rule."""
    torch_optim, ours = torch.optim, torchcalc.optim
    lists, loop = dict(foreach=True), dict(foreach=False)
    stock = (
        lists if size == "small" else loop
    )  # a large tensor stays in no cache from one operation of a list to the next
    for name, dtype, against, slots in (
        ("RMSprop", torch.float32, (torch_optim, stock), 1),
        ("RMSprop", torch.bfloat16, (torch_optim, stock), 1),
        ("Adagrad", torch.float32, (torch_optim, dict(fused=True)), 1),
        ("NAdam", torch.float32, (torch_optim, stock), 2),
        ("Lion", torch.float32, (ours, stock), 1),
        ("Lion", torch.bfloat16, (ours, stock), 1),
    ):
        library, options = against
        spelled = ", ".join(f"{k}={v}" for k, v in options.items())
        yield step_row(
            f"{'bf16 ' if dtype == torch.bfloat16 else ''}{name}, {size}",
            shapes,
            optimizer(getattr(library, name), **options),
            optimizer(getattr(ours, name)),
            dtype=dtype,
            slots=slots,
            against=f"{'its rule, ' if library is ours else ''}{name}({spelled})",
            target=2.0 if size == "small" else 0.97,
            **{**common, "seconds": common["seconds"] / 2},
        )


def growth(seconds: float) -> list[dict[str, float]]:
    """The cost of an AdamW step against the number of parameters: GPT shapes of growing width."""
    curve = []
    for width in (16, 32, 64, 128, 256, 512, 1024):
        shapes = gpt(layers=4, width=width, vocabulary=256, context=128)
        stock = optimizer(torch.optim.AdamW, fused=True)(parameters(shapes))
        ours = optimizer(torchcalc.optim.AdamW)(parameters(shapes))
        times = [sorted(t)[len(t) // 2] for t in interleaved([stock, ours], seconds)]
        curve.append({"parameters": elements(shapes), "stock": times[0], "ours": times[1]})
    return curve


def memory_rows() -> Iterator[MemoryRow]:
    """Making the optimizer's state and two steps, above the parameters and their gradients."""

    def steps(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Any], Any]:
        def run(params: list[Tensor]) -> torch.optim.Optimizer:
            optimizer = cls(params, **options)
            for _ in range(2):
                optimizer.step()
            return optimizer

        return run

    torch_adamw, adamw = torch.optim.AdamW, torchcalc.optim.AdamW
    for name, against, stock, ours in (
        ("AdamW, large: peak memory", "AdamW()", steps(torch_adamw), steps(adamw)),
        ("AdamW, large: peak memory", "AdamW(foreach=True)", steps(torch_adamw, foreach=True), steps(adamw)),
        ("AdamW, large: peak memory", "AdamW(fused=True)", steps(torch_adamw, fused=True), steps(adamw)),
    ):
        yield MemoryRow(name, against, lambda _: parameters(LARGE), stock, ours, target=0.99)
