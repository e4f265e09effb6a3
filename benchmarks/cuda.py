"""Stock and torchcalc on a GPU, as ratios: ``make bench-cuda``, or ``python3 -m benchmarks.cuda [PART OF A NAME ...]`` anywhere.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchcalc.functional as ours
import torchcalc.optim
from benchmarks.functions import LOSSES, UNARY, pair
from benchmarks.models import LARGE, SMALL, Shape
from torchcalc.optim import AdamW

Call = Callable[[], Any]

BUDGET = 175.0  # seconds, of which the last rows get what is left


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


def optimizer(name: str, bar: float, **options: Any) -> Result:
    """52 tensors, against torch's default: fused where that is asked for, lists of tensors else."""
    a, b = parameters(SMALL, torch.float32), parameters(SMALL, torch.float32)
    stock = getattr(torch.optim, name)(a, **options)
    mine = getattr(torchcalc.optim, name)(b, **options)
    for _ in range(3):
        stock.step()
        mine.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-4)
    options.pop("lr", None)
    return measure(f"{name}{options or ''}, 52 tensors", bar, stock.step, mine.step, seconds=0.5)


def pointwise(name: str, bar: float, n: int, dtype: torch.dtype) -> Result:
    stock, mine = pair(name)
    count = 2 if name in GATES else 1
    xs = [torch.randn(n, dtype=dtype, device="cuda") for _ in range(count)]
    if name == "log":
        xs = [xs[0].abs() + 0.1]
    leaves = [x.requires_grad_() for x in xs]
    g = torch.randn_like(stock(*leaves))

    def both(f: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(f(*leaves), leaves, g)

    return measure(f"{name} {n:,} {str(dtype)[6:]}", bar, both(stock), both(mine), seconds=0.6)


def loss(name: str, bar: float, shape: Shape = (8192, 1024), dtype: torch.dtype = torch.float32) -> Result:
    x = torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)
    rest: list[Tensor] = [torch.rand_like(x)]
    if name == "cross_entropy":
        rest = [torch.randint(shape[1], (*shape[:1], *shape[2:]), device="cuda")]
    elif name == "gaussian_nll_loss":
        rest.append(rest[0] + 0.5)
    elif name == "binary_cross_entropy":
        x = torch.rand_like(x).mul_(0.9).add_(0.05).requires_grad_()

    def both(f: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(f(x, *rest), x)

    stock, mine = map(both, pair(name))
    result = measure(f"{name} {'x'.join(map(str, shape))} {str(dtype)[6:]}", bar, stock, mine)
    if name == "cross_entropy":
        result.stock_mb, result.ours_mb = peak(stock), peak(mine)
    return result


def head_loss(name: str, bar: float, n: int, d: int, v: int, recompute: bool = False, eps: float = 0.0) -> Result:
    """linear_cross_entropy against a linear layer and cross_entropy; the memory is without the gradients, which both make."""
    x = torch.randn(n, d, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    w = (torch.randn(v, d, device="cuda") / d**0.5).bfloat16().requires_grad_()
    t = torch.randint(v, (n,), device="cuda")

    def stock() -> Any:
        return torch.autograd.grad(F.cross_entropy(F.linear(x, w), t), (x, w))

    def mine() -> Any:
        return torch.autograd.grad(ours.linear_cross_entropy(x, w, t, recompute=recompute, filter_eps=eps), (x, w))

    for a, b in zip(stock(), mine(), strict=True):
        atol = 5e-3 * float(a.abs().max()) + eps / n * float(w.detach().norm(dim=1).max()) * 64
        torch.testing.assert_close(a, b, rtol=0.05, atol=atol)
    result = measure(name, bar, stock, mine, rounds=6)
    gradients = (x.nbytes + w.nbytes) / 2**20
    result.stock_mb, result.ours_mb = peak(stock) - gradients, peak(mine) - gradients
    return result


def peak(call: Call) -> float:
    """MB beyond what was there before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def norm(name: str, bar: float, dtype: torch.dtype) -> Result:
    x = torch.randn(8192, 4096, dtype=dtype, device="cuda", requires_grad=True)
    parameters = [torch.rand(4096, dtype=dtype, device="cuda", requires_grad=True)]
    if name == "layer_norm":
        parameters.append(torch.rand(4096, dtype=dtype, device="cuda", requires_grad=True))
    g = torch.randn_like(x)

    def both(f: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(f(x, [4096], *parameters), [x, *parameters], g)

    return measure(f"{name} 8192x4096 {str(dtype)[6:]}", bar, both(getattr(F, name)), both(getattr(ours, name)))


#: Weights of linear layers of 768 features, and what torch makes of them.
BLOCKS: dict[str, tuple[list[Shape], Callable[..., Tensor]]] = {
    "linear": ([(768, 768), (768,)], F.linear),
    "mlp": ([(3072, 768), (768, 3072)], lambda x, w, v: F.linear(F.gelu(F.linear(x, w)), v)),
    "gated_mlp": (
        [(2048, 768), (2048, 768), (768, 2048)],
        lambda x, w, u, v: F.linear(F.silu(F.linear(x, w)) * F.linear(x, u), v),
    ),
}


def block(name: str, bar: float, dtype: torch.dtype) -> Result:
    """Of 8,192 samples, against torch's operations."""
    shapes, stock = BLOCKS[name]
    leaves = [
        (torch.randn(s, device="cuda") / (s[-1] ** 0.5 if k else 1)).to(dtype).requires_grad_()
        for k, s in enumerate([(8192, 768), *shapes])
    ]
    g = torch.randn(8192, 768, device="cuda").to(dtype)

    def both(f: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(f(*leaves), leaves, g)

    mine: Callable[..., Tensor] = getattr(ours, name)
    for a, b in zip(both(mine)(), both(stock)(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(b.abs().max()))
    result = measure(f"{name} 8192x768x{shapes[0][0]} {str(dtype)[6:]}", bar, both(stock), both(mine))
    result.stock_mb, result.ours_mb = kept(partial(stock, *leaves)), kept(partial(mine, *leaves))
    return result


def kept(forward: Call) -> float:
    """MB that forward keeps for backward, its result among them."""
    before = torch.cuda.memory_allocated()
    y = forward()
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated()
    del y
    return (after - before) / 2**20


def attention(shape: Shape) -> Result:
    """Batch, heads, length, features; causal, bfloat16."""
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    g = torch.randn_like(leaves[0])

    def both(f: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(f(*leaves, is_causal=True), leaves, g)

    stock, mine = both(F.scaled_dot_product_attention), both(ours.scaled_dot_product_attention)
    return measure(
        f"scaled_dot_product_attention {'x'.join(map(str, shape))}",
        0.9 if shape[2] < 64 else 1.0,
        stock,
        mine,
        seconds=0.8,
    )


def dropout(n: int) -> Result:
    x = torch.randn(n, device="cuda", requires_grad=True)
    g = torch.randn_like(x)

    def both(f: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(f(x, 0.1), x, g)

    return measure(f"dropout {n:,}", 0.9 if n < 2**20 else 1.0, both(F.dropout), both(ours.dropout), seconds=0.6)


def embedding(scale: float) -> Result:
    """8,192 tokens of 50,257, 768 features."""
    w = torch.randn(50257, 768, device="cuda", requires_grad=True)
    index = torch.randint(50257, (8192,), device="cuda")
    g = torch.randn(8192, 768, device="cuda")

    def stock() -> Any:
        y = F.embedding(index, w)
        return torch.autograd.grad(y if scale == 1 else y * scale, w, g)

    def mine() -> Any:
        return torch.autograd.grad(ours.embedding(index, w, scale=scale), w, g)

    return measure(f"embedding 50257x768, 8192 tokens{'' if scale == 1 else ', scaled'}", 1.0, stock, mine, seconds=0.6)


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

    def __init__(
        self, gelu: Callable[..., Tensor], cross_entropy: Callable[..., Tensor], layers: int = 12, fused: bool = False
    ) -> None:
        super().__init__()
        self.cross_entropy, self.fused = cross_entropy, fused  # the latter takes the head too
        self.tokens, self.places = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.blocks = nn.ModuleList(Block(768, 12, gelu) for _ in range(layers))
        self.norm = nn.LayerNorm(768)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.fused:
            return self.cross_entropy(x.flatten(0, 1), self.tokens.weight, targets.flatten())
        logits = F.linear(x, self.tokens.weight)
        return self.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(name: str, bar: float, compiled: bool, fused: bool = False) -> Result:
    tokens = torch.randint(50257, (8, 1024), device="cuda")
    targets = tokens.roll(-1, 1)

    def make(stock: bool) -> Call:
        torch.manual_seed(0)
        with torch.device("cuda"):
            if stock:
                model = GPT(F.gelu, F.cross_entropy)
            else:
                model = GPT(ours.gelu, ours.linear_cross_entropy if fused else ours.cross_entropy, fused=fused)
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
            assert call().isfinite()
        peaks.append(peak(call))
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
    table += [
        row("cross_entropy", loss, "cross_entropy", bar, shape, dtype)
        for bar, shape, dtype in (
            (0.9, (32, 10), single), (1.0, (8192, 1024), single), (2.0, (8192, 50257), single),
            (1.6, (8192, 50257), half), (1.0, (8, 21, 512, 512), single), (1.0, (8, 21, 512, 512), half),
        )
    ]  # fmt: skip
    table += [row(name, head_loss, name, 1.0, *sizes) for name, sizes in HEADS.items()]
    table += [row(name, gpt, name, bar, compiled, fused) for name, bar, compiled, fused in GPTS]
    table += [row(name, optimizer, name, 1.0) for name in ("NAdam", "ASGD")]
    for eps, name in ((0.0, RECOMPUTED), (2**-12, f"{RECOMPUTED}, filtered")):
        table.append(row(name, head_loss, name, 0.9, 8192, 2304, 256000, True, eps))
    table += [row(name, block, name, bar, half) for name, bar in (("gated_mlp", 1.05), ("mlp", 1.0), ("linear", 0.97))]
    table += [row("scaled_dot_product_attention", attention, shape) for shape in ((1, 2, 8, 16), (8, 12, 1024, 64))]
    table += [row("dropout", dropout, n) for n in (1024, 2**24)]
    table += [row("embedding", embedding, scale) for scale in (1.0, 2.0)]
    table += [row(name, norm, name, 1.0, dtype) for name in ("rms_norm", "layer_norm") for dtype in (single, half)]
    first = ("gelu", "silu", "tanh")  # the rest while there is time
    for names in (first, [name for name in UNARY if name not in first] + [*GATES]):
        table += [
            row(name, pointwise, name, bar, n, dtype)
            for name in names
            for n, bar, dtype in ((1024, 0.9, single), (2**24, 1.0, single), (2**24, 1.0, half))
        ]
    table += [row(name, loss, name, 1.0) for name in LOSSES]
    table += [row(name, optimizer, name, 1.0) for name in ("Adam", "Adagrad", "Adadelta", "Adamax", "RAdam")]
    table += [row(name, optimizer, name, 1.0) for name in ("RMSprop", "Rprop")]
    table.append((name := "SGD", lambda: optimizer(name, 1.0, lr=1e-3, momentum=0.9)))
    return table


GATES = ("swiglu", "geglu", "reglu")
HEADS = {
    "linear_cross_entropy 8192x768x50257 bfloat16": (8192, 768, 50257),
    "linear_cross_entropy 8192x2304x256000 bfloat16": (8192, 2304, 256000),
}
RECOMPUTED = "linear_cross_entropy 8192x2304x256000 recomputed"
#: Bars are those of a swap of GELU, cross-entropy, clipping and AdamW; and of the head too.
GPTS = (
    ("GPT-2 124M, 8x1024, eager", 1.02, False, False),
    ("GPT-2 124M, 8x1024, eager, fused head", 1.15, False, True),
    ("GPT-2 124M, 8x1024, compiled", 1.0, True, False),
)


def main() -> int:
    print(head(), flush=True)
    if not torch.cuda.is_available():
        print("bench-cuda: not run, for there is no CUDA device")
        return 0
    start, results = time.monotonic(), []
    print(f"{'':44} {'stock ms':>9} {'ours ms':>9} {'ratio':>7} {'±':>5} {'bar':>5}", flush=True)
    wanted = sys.argv[1:]
    for name, run in rows():
        if wanted and not any(part in name for part in wanted):
            continue
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
