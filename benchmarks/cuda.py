"""Stock and torchcalc on a GPU, as ratios: ``make bench-cuda``, or ``python3 -m benchmarks.cuda`` anywhere.

It needs torch with its Triton and a CUDA device, nothing installed, no network; under four minutes. Both sides run in turn,
in rounds whose order is swapped; a ratio is the median of the rounds' ratios stock/ours, above 1 if we are faster. Times are
wall-clock, from an idle device to an idle device, since at small sizes the host's work is what counts. With ``$OUT``
set, the numbers are also written to ``$OUT/bench-cuda.json``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchcalc.functional as ours
from benchmarks.models import LARGE, SMALL, Shape
from torchcalc.optim import AdamW

Call = Callable[[], Any]

BUDGET = 225.0  # seconds, of which the last rows get what is left


@dataclass
class Result:
    """One row."""

    name: str
    bar: float
    stock_ms: float
    ours_ms: float
    ratio: float
    spread: float
    stock_mb: float | None = None  # peak memory beyond what was there before
    ours_mb: float | None = None
    error: str = ""


def head() -> str:
    triton = getattr(sys.modules.get("triton"), "__version__", None)
    if triton is None:
        try:
            import triton as module

            triton = module.__version__
        except ImportError:
            triton = "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return f"{device}; torch {torch.__version__}, Triton {triton}, Python {platform.python_version()}"


def timed(call: Call, repeats: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(name: str, bar: float, stock: Call, mine: Call, *, rounds: int = 15, seconds: float = 1.5) -> Result:
    for _ in range(3):
        stock()
        mine()
    each = timed(stock, 3) + timed(mine, 3)
    repeats = max(1, min(200, int(seconds / rounds / max(each, 1e-6))))
    times: list[tuple[float, float]] = []
    for i in range(rounds):
        if i % 2:
            b = timed(mine, repeats)
            a = timed(stock, repeats)
        else:
            a = timed(stock, repeats)
            b = timed(mine, repeats)
        times.append((a, b))
    ratios = sorted(a / b for a, b in times)
    quarter = len(ratios) // 4
    return Result(
        name,
        bar,
        1e3 * statistics.median(a for a, _ in times),
        1e3 * statistics.median(b for _, b in times),
        statistics.median(ratios),
        ratios[-1 - quarter] - ratios[quarter],
    )


def parameters(shapes: list[Shape], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        p = nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda").uniform_(-1, 1, generator=generator))
        p.grad = torch.empty(shape, dtype=dtype, device="cuda").uniform_(-1e-2, 1e-2, generator=generator)
        params.append(p)
    return params


def adamw(name: str, bar: float, shapes: list[Shape], dtype: torch.dtype, clips: bool) -> Result:
    a, b = parameters(shapes, dtype), parameters(shapes, dtype)
    stock = torch.optim.AdamW(a, fused=True)
    mine = AdamW(b, max_norm=1.0 if clips else None)

    def stock_step() -> None:
        if clips:
            nn.utils.clip_grad_norm_(a, 1.0)
        stock.step()

    for _ in range(3):
        stock_step()
        mine.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(q, p, rtol=8 * torch.finfo(dtype).eps, atol=1e-4)
    return measure(name, bar, stock_step, mine.step)


def pointwise(name: str, bar: float, n: int, dtype: torch.dtype) -> Result:
    stock = getattr(F, name) if name in ("relu", "gelu", "silu") else getattr(torch, name)
    x = torch.randn(n, dtype=dtype, device="cuda", requires_grad=True)
    g = torch.randn_like(x)

    def both(f: Callable[[Tensor], Tensor]) -> Call:
        return lambda: torch.autograd.grad(f(x), x, g)

    return measure(f"{name} {n:,} {str(dtype)[6:]}", bar, both(stock), both(getattr(ours, name)))


def loss(name: str, bar: float) -> Result:
    x = torch.randn(8192, 1024, device="cuda", requires_grad=True)
    t = torch.rand(8192, 1024, device="cuda")
    if name == "cross_entropy":
        t = torch.randint(1024, (8192,), device="cuda")

    def both(f: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(f(x, t), x)

    return measure(f"{name} 8192x1024", bar, both(getattr(F, name)), both(getattr(ours, name)))


def norm(name: str, bar: float, dtype: torch.dtype) -> Result:
    x = torch.randn(8192, 4096, dtype=dtype, device="cuda", requires_grad=True)
    parameters = [torch.rand(4096, dtype=dtype, device="cuda", requires_grad=True)]
    if name == "layer_norm":
        parameters.append(torch.rand(4096, dtype=dtype, device="cuda", requires_grad=True))
    g = torch.randn_like(x)

    def both(f: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(f(x, [4096], *parameters), [x, *parameters], g)

    return measure(f"{name} 8192x4096 {str(dtype)[6:]}", bar, both(getattr(F, name)), both(getattr(ours, name)))


class Block(nn.Module):
    """Of GPT-2."""

    def __init__(self, width: int, heads: int, gelu: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.gelu = heads, gelu
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(n, t, d))
        return x + self.down(self.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 124M, without dropout."""

    def __init__(self, gelu: Callable[..., Tensor], cross_entropy: Callable[..., Tensor], layers: int = 12) -> None:
        super().__init__()
        self.cross_entropy = cross_entropy
        self.tokens, self.places = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.blocks = nn.ModuleList(Block(768, 12, gelu) for _ in range(layers))
        self.norm = nn.LayerNorm(768)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return self.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(name: str, bar: float, compiled: bool) -> Result:
    tokens = torch.randint(50257, (8, 1024), device="cuda")
    targets = tokens.roll(-1, 1)

    def make(stock: bool) -> Call:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = GPT(F.gelu, F.cross_entropy) if stock else GPT(ours.gelu, ours.cross_entropy)
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            if stock
            else AdamW(model.parameters(), lr=1e-4, max_norm=1.0)
        )
        forward: Callable[..., Tensor] = torch.compile(model) if compiled else model

        def step() -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                loss = forward(tokens, targets)
            loss.backward()
            if stock:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    stock, mine = make(True), make(False)
    peaks = []
    for call in (stock, mine):
        for _ in range(3):
            value = call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        value = call()
        torch.cuda.synchronize()
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        assert value.isfinite()
    result = measure(name, bar, stock, mine, rounds=8, seconds=6.0)
    result.stock_mb, result.ours_mb = peaks
    return result


def rows() -> list[tuple[str, Callable[[], Result]]]:
    def row(name: str, f: Callable[..., Result], *args: Any) -> tuple[str, Callable[[], Result]]:
        return name, lambda: f(*args)

    single, half = torch.float32, torch.bfloat16
    table = [
        row(name, adamw, name, bar, shapes, dtype, clips)
        for name, bar, shapes, dtype, clips in (
            ("AdamW, 52 tensors", 4.0, SMALL, single, False),
            ("AdamW, 52 tensors, clipping", 4.0, SMALL, single, True),
            ("AdamW, 124M", 1.05, LARGE, single, False),
            ("AdamW, 124M, clipping", 1.3, LARGE, single, True),
            ("AdamW, 124M bfloat16", 1.0, LARGE, half, False),
            ("AdamW, 124M bfloat16, clipping", 1.3, LARGE, half, True),
        )
    ]
    names = [name for name in ("relu", "sigmoid", "tanh", "gelu", "silu") if hasattr(ours, name)]
    table += [
        row(name, pointwise, name, bar, n, dtype)
        for n, bar in ((1024, 0.9), (2**24, 1.0))
        for name in names
        for dtype in ((single, half) if n > 1024 else (single,))
    ]
    table += [row(name, loss, name, 1.0) for name in ("mse_loss", "l1_loss", "huber_loss")]
    table += [row(name, loss, name, 1.0) for name in ("binary_cross_entropy_with_logits", "cross_entropy")]
    table += [row(name, norm, name, 1.0, dtype) for name in ("rms_norm", "layer_norm") for dtype in (single, half)]
    table += [row(name, gpt, name, bar, compiled) for name, bar, compiled in GPTS]
    return table


GPTS = (("GPT-2 124M, 8x1024, eager", 1.02, False), ("GPT-2 124M, 8x1024, compiled", 1.0, True))


def main() -> int:
    print(head(), flush=True)
    if not torch.cuda.is_available():
        print("bench-cuda: not run, for there is no CUDA device")
        return 0
    start, results = time.monotonic(), []
    print(f"{'':44} {'stock ms':>9} {'ours ms':>9} {'ratio':>7} {'±':>5} {'bar':>5}", flush=True)
    for name, run in rows():
        if time.monotonic() - start > BUDGET:
            results.append(Result(name, 0, 0, 0, 0, 0, error="left out: no time"))
        else:
            try:
                results.append(run())
            except Exception as error:  # a row that fails must not cost the others
                results.append(Result(name, 0, 0, 0, 0, 0, error=f"{type(error).__name__}: {error}"[:200]))
            torch.cuda.empty_cache()
        r = results[-1]
        memory = f"  {r.stock_mb:,.0f} MB, ours {r.ours_mb:,.0f} MB" if r.ours_mb is not None else ""
        figures = f"{r.stock_ms:9.3f} {r.ours_ms:9.3f} {r.ratio:7.2f} {r.spread / 2:5.2f} {r.bar:5.2f}{memory}"
        print(f"{r.name:44} {r.error or figures}", flush=True)
    if out := os.environ.get("OUT"):
        report = {"on": head(), "rows": [asdict(r) for r in results]}
        Path(out, "bench-cuda.json").write_text(json.dumps(report, indent=1))
    good = sum(not r.error and r.ratio >= r.bar for r in results)
    failed = sum(bool(r.error) for r in results)
    print(
        f"bench-cuda: {good} of {len(results)} rows reach their bar, {failed} without a figure, "
        f"{time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
