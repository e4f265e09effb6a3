"""A GPT that is built of torchcalc's parts or of torch's own, with the same parameters under the same names."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from torchcalc import functional as calc
from torchcalc import nn as calc_nn
from torchcalc import optim

Kind = Literal["torchcalc", "torch"]


@dataclass(frozen=True)
class Parts:
    """What a GPT is made of."""

    linear: Callable[..., nn.Linear]
    embedding: Callable[..., nn.Embedding]
    norm: Callable[..., nn.RMSNorm]
    gated_mlp: Callable[..., nn.Module]
    attention: Callable[..., Tensor]
    add_norm: Callable[[Tensor, Tensor, nn.RMSNorm], tuple[Tensor, Tensor]]  # the norm of a sum, and the sum
    loss: Callable[..., Tensor]  # of (N, D), the words' vectors (V, D), (N,)
    optimizer: Callable[..., Optimizer]


class StockMLP(nn.Module):
    """torchcalc.nn.GatedMLP as one writes it with torch."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def stock_add_norm(x: Tensor, residual: Tensor, norm: nn.RMSNorm) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total), total


def stock_loss(x: Tensor, words: Tensor, target: Tensor, normalizer: Tensor | None = None) -> Tensor:
    if normalizer is None:
        return F.cross_entropy(F.linear(x, words), target)
    return F.cross_entropy(F.linear(x, words), target, reduction="sum") / normalizer


class StockAdamW(AdamW):
    """torch's, with the gradient clipped as one does before each step."""

    def __init__(self, params: Any, *, max_norm: float, **options: Any):
        super().__init__(params, **options)
        self.max_norm = max_norm

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.max_norm)
        super().step()
        return loss


PARTS: dict[Kind, Parts] = {
    "torchcalc": Parts(
        calc_nn.Linear,
        calc_nn.Embedding,
        calc_nn.RMSNorm,
        calc_nn.GatedMLP,
        calc.scaled_dot_product_attention,
        lambda x, residual, norm: calc.add_rms_norm(x, residual, norm.normalized_shape, norm.weight, norm.eps),
        calc.linear_cross_entropy,
        optim.AdamW,
    ),
    "torch": Parts(
        nn.Linear,
        nn.Embedding,
        nn.RMSNorm,
        StockMLP,
        F.scaled_dot_product_attention,
        stock_add_norm,
        stock_loss,
        partial(StockAdamW, fused=True),
    ),
}


class Block(nn.Module):
    """Attention and a gated perceptron; each adds to the stream, and gets the stream normalized."""

    def __init__(self, width: int, heads: int, parts: Parts):
        super().__init__()
        self.heads, self.parts = heads, parts
        self.qkv = parts.linear(width, 3 * width, bias=False)
        self.out = parts.linear(width, width, bias=False)
        self.mlp_norm = parts.norm(width)
        self.mlp = parts.gated_mlp(width, 8 * width // 3)
        self.next_norm = parts.norm(width)  # of the next block's attention, or of the head

    def forward(self, normed: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = self.parts.attention(q, k, v, is_causal=True)
        normed, stream = self.parts.add_norm(self.out(attended.transpose(1, 2).flatten(2)), stream, self.mlp_norm)
        return self.parts.add_norm(self.mlp(normed), stream, self.next_norm)


class GPT(nn.Module):
    """Words (N, T) to logits (N, T, words); with targets, to the loss: a sharded weight is whole within forward only.

    Args:
        words: the vocabulary's size; its vectors serve as the head as well.
        context: T at most.
        width, layers, heads: of the blocks.
        kind: whose parts; parameters, their names and their initial values under the same seed are the same.
    """

    def __init__(self, words: int, context: int, width: int, layers: int, heads: int, kind: Kind = "torchcalc"):
        super().__init__()
        self.parts = parts = PARTS[kind]
        self.words, self.positions = parts.embedding(words, width), parts.embedding(context, width)
        self.norm = parts.norm(width)
        self.blocks = nn.ModuleList(Block(width, heads, parts) for _ in range(layers))
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what adds to the stream is smaller, so that the stream's size does not grow with depth
                last = name.endswith(("out.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, words: Tensor, target: Tensor | None = None, **options: Any) -> Any:
        stream = self.words(words) + self.positions.weight[: words.shape[1]]
        normed = self.norm(stream)
        for block in self.blocks:
            normed, stream = block(normed, stream)
        if target is None:
            return F.linear(normed, self.words.weight)
        return self.parts.loss(normed.flatten(0, 1), self.words.weight, target.flatten(), **options)

    def optimizer(self, lr: float, weight_decay: float) -> Optimizer:
        """AdamW that lets matrices decay; vectors of a norm, and the positions, are scales and offsets, and do not."""
        matrices = {name: p for name, p in self.named_parameters() if p.dim() == 2 and name != "positions.weight"}
        others = [p for name, p in self.named_parameters() if name not in matrices]
        groups = [{"params": [*matrices.values()]}, {"params": others, "weight_decay": 0.0}]
        return self.parts.optimizer(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, max_norm=1.0)

    @torch.no_grad()
    def generate(self, words: Tensor, count: int, context: int, temperature: float = 0.8, seed: int = 0) -> Tensor:
        """Go on from words (T,) with ``count`` more, drawn by a generator of their own."""
        generator = torch.Generator(device=words.device).manual_seed(seed)
        for _ in range(count):
            logits = self(words[None, -context:])[0, -1].float()
            words = torch.cat([words, torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)])
        return words
