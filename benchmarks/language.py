"""Steps of a small GPT on the CPU, of stock parts and of ours: time, and peak memory in fresh processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchcalc.functional as ours
import torchcalc.nn
import torchcalc.optim
from benchmarks.harness import Row
from benchmarks.memory import MemoryRow

LAYERS, WIDTH, HEADS, WORDS, BATCH, LENGTH = 6, 384, 6, 8192, 8, 256
HIDDEN = 1024  # of the gated block: 8/3 of the width


class StockBlock(nn.Module):
    """Norms, attention and a SwiGLU block, as they are written with torch's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(attend(self.qkv(self.norm1(x)), F.scaled_dot_product_attention))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class OurBlock(StockBlock):
    """The same parameters; the second norm takes the first sum with it."""

    def forward(self, x: Tensor) -> Tensor:
        shape = [WIDTH]
        y = ours.rms_norm(x, shape, self.norm1.weight)
        y = self.out(attend(self.qkv(y), ours.scaled_dot_product_attention))
        y, x = ours.add_rms_norm(x, y, shape, self.norm2.weight)
        return x + ours.gated_mlp(y, self.gate.weight, self.up.weight, self.down.weight)


def attend(qkv: Tensor, f: Callable[..., Tensor]) -> Tensor:
    n, t, _ = qkv.shape
    q, k, v = qkv.view(n, t, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    y: Tensor = f(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(n, t, WIDTH)


class GPT(nn.Module):
    """A language model and its loss."""

    def __init__(self, stock: bool) -> None:
        super().__init__()
        self.stock = stock
        self.tokens = (nn if stock else torchcalc.nn).Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(*((StockBlock if stock else OurBlock)() for _ in range(LAYERS)))
        self.norm = (nn if stock else torchcalc.nn).RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(tokens))).flatten(0, 1)
        if self.stock:
            return F.cross_entropy(self.head(x), targets.flatten())
        loss: Tensor = ours.linear_cross_entropy(x, self.head.weight, targets.flatten())
        return loss


def step(stock: bool, compiled: bool = False) -> Callable[[], Tensor]:
    """One step of training, clipping and AdamW: fused, as torch's is fastest. The optimizer has its state."""
    torch.manual_seed(0)
    model = GPT(stock)
    tokens = torch.randint(WORDS, (BATCH, LENGTH))
    targets = tokens.roll(-1, 1)
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        if stock
        else torchcalc.optim.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    forward: Callable[..., Tensor] = torch.compile(model) if compiled else model

    def run() -> Tensor:
        loss = forward(tokens, targets)
        loss.backward()
        if stock:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def rows() -> Iterator[Row]:
    """A step of 2,048 tokens, eager and compiled."""
    for compiled in (False, True):

        def make(compiled: bool = compiled) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], None]]:
            stock, mine = step(True, compiled), step(False, compiled)

            def same() -> None:
                for _ in range(2):
                    torch.testing.assert_close(mine(), stock(), rtol=1e-4, atol=1e-4)

            return stock, mine, same

        yield Row(
            f"GPT step, 6 layers, 384 wide, 8x256 tokens{', compiled' if compiled else ''}",
            "torch's parts, clip_grad_norm_, fused AdamW", make,
            target=1.0 if compiled else 1.2, group="language", seconds=40.0, quick=False,
        )  # fmt: skip


def backward_of(loss: Callable[..., Tensor], given: tuple[Tensor, ...]) -> None:
    (loss(*given) / 8).backward()


def memory_rows() -> Iterator[MemoryRow]:
    """Forward and backward of a loss over eight micro-batches, or of a step; gradients are part of the peak."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).requires_grad_()

    def logits(shape: tuple[int, int], _: str) -> tuple[Tensor, Tensor]:
        return normal(*shape), torch.randint(shape[1], shape[:1])

    for shape in ((8192, 1024), (2048, 32_000)):
        yield MemoryRow(
            f"cross_entropy, {shape[0]}x{shape[1]}: peak memory", "torch's cross_entropy",
            partial(logits, shape),
            partial(backward_of, F.cross_entropy), partial(backward_of, ours.cross_entropy),
            target=1 / 0.55,
        )  # fmt: skip
    name = "linear_cross_entropy, 2048x512x32000: peak memory"
    for against, stock, target in (
        ("torch's linear and cross_entropy", lambda x, w, t: F.cross_entropy(F.linear(x, w), t), 5.0),
        (
            "torch's chunked linear_cross_entropy",
            lambda x, w, t: F.linear_cross_entropy(x, w, t, options=nn.LinearCrossEntropyOptions()),
            1.0,
        ),
    ):
        if target == 1.0 and not hasattr(F, "linear_cross_entropy"):
            continue
        yield MemoryRow(
            name, against, lambda _: (normal(2048, 512), normal(32_000, 512), torch.randint(32_000, (2048,))),
            partial(backward_of, stock),
            partial(backward_of, ours.linear_cross_entropy), target=target,
        )  # fmt: skip
    yield MemoryRow(
        "gated_mlp, 4096x512x1408: kept by forward", "torch's linear, silu and product",
        lambda _: (normal(4096, 512), normal(1408, 512), normal(1408, 512), normal(512, 1408)),
        lambda given: F.linear(F.silu(F.linear(given[0], given[1])) * F.linear(given[0], given[2]), given[3]),
        lambda given: ours.gated_mlp(*given), target=1.7, kept=True,
    )  # fmt: skip
    yield MemoryRow(
        "GPT step, 6 layers, 384 wide, 8x256 tokens: peak memory", "torch's parts, clip_grad_norm_, fused AdamW",
        lambda side: step(side == "stock"), lambda run: run(), lambda run: run(), target=1 / 0.65,
    )  # fmt: skip
