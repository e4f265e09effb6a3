"""Right functions that are unusual in something: none may have an error. Ordinary ones are in right.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tests.testing.right import Right, f, normal, positive, unit

x, y = normal(3, 4), normal(3, 4, seed=1)
square, spread = normal(3, 3), torch.tensor([[0, 1], [3, 2], [1, 1]])
small = torch.tensor([1e-5, 2e-5, 3.0, 0.1])
zero_row = torch.cat([x[:1] * 0, x[1:]])
noise = -(-unit(3, 4).log()).log()


class Same(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Sine(Function):
    """Its backward is a Function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Slope.apply(g, *ctx.saved_tensors)


class Slope(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(g, a)
        return g * a.cos()

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, a = ctx.saved_tensors
        return h * a.cos(), -h * g * a.sin()


class Root(Function):
    """z³ + z = a, by Newton's method; the derivative by the implicit function theorem."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        z = a.sign() * a.abs() ** (1 / 3)
        for _ in range(60):
            z = z - (z**3 + z - a) / (3 * z**2 + 1)
        ctx.save_for_backward(z)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / (3 * ctx.saved_tensors[0] ** 2 + 1)


def cube(ctx: Any, a: Tensor) -> Tensor:
    ctx.save_for_backward(a)
    return a**3


made = type(
    "Made",
    (Function,),
    {"forward": staticmethod(cube), "backward": staticmethod(lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2)},
)


def encoding(a: Tensor) -> Tensor:
    """NeRF's: sines and cosines of 1 to 512 periods."""
    z = a[..., None] * 2.0 ** torch.arange(10, dtype=a.dtype) * math.pi
    return torch.cat([z.sin(), z.cos()], -1).flatten(-2)


def scan(a: Tensor, b: Tensor) -> Tensor:
    h, out = torch.zeros_like(a[:, 0]), []
    for t in range(a.shape[1]):
        h = h * b[:, t].sigmoid() + a[:, t]
        out.append(h)
    return torch.stack(out, 1)


def in_place(a: Tensor) -> Tensor:
    b = a.clone()
    b.mul_(2)
    b[:, ::2].mul_(3)
    b += 1
    return b


def derivative(a: Tensor) -> Tensor:
    return torch.func.grad(lambda b: b.sin().prod())(a)


def twice(a: Tensor) -> Tensor:
    return (a.sin() * a).tanh()


def table(*rows: tuple[str, Callable[..., Any], Any]) -> list[Right]:
    return [f(name, fn, *(inputs if isinstance(inputs, tuple) else (inputs,))) for name, fn, inputs in rows]


PLAIN = table(
    ("identity", lambda a: a, x),
    ("nn.Identity", nn.Identity(), x),
    ("identity of a Function", Same.apply, x),
    ("dropout in eval", nn.Dropout(0.5).eval(), x),
    ("dropout of nothing", nn.Dropout(0.0), x),
    ("contiguous", lambda a: a.contiguous(), x),
    ("sine and cosine", lambda a: (a.sin(), a.cos()), x),
    ("a dict", lambda a: {"sine": a.sin(), "double": a * 2}, x),
    ("chunk", lambda a: a.chunk(2, 1), x),
    ("made by type()", made.apply, x),
    ("double backward", Sine.apply, x),
    ("nested Functions", lambda a: Sine.apply(made.apply(a)), x),
    ("implicit", Root.apply, x),
    ("checkpointed", lambda a: checkpoint(twice, a, use_reentrant=False), x),
    ("checkpointed, reentrant", lambda a: checkpoint(twice, a, use_reentrant=True), x),
    ("vmap inside", torch.func.vmap(torch.sin), x),
    ("grad inside", derivative, normal(4)),
    ("in-place inside", in_place, x),
    ("scan", scan, (x, y)),
)
SCALES = table(
    ("sin(1e4 x)", lambda a: (1e4 * a).sin(), x),
    ("NeRF's encoding", encoding, x),
    ("exp(50 x)", lambda a: (50 * a).exp(), x),
    ("1e8 x", lambda a: 1e8 * a, x),
    ("1e-8 x", lambda a: 1e-8 * a, x),
    ("1/x at 1e-3", torch.reciprocal, torch.tensor([1e-3, -1e-3, 2e-3, 0.5])),
    ("(x + 1e6)²", lambda a: (a + 1e6) ** 2, x),
    ("log at 1e-5", torch.log, small),
    ("sqrt at 1e-9", torch.sqrt, torch.tensor([1e-9, 2e-8])),
    ("tanh(1e4 x)", lambda a: (1e4 * a).tanh(), torch.tensor([1e-5, -2e-5, 1e-4, 0.5])),
    ("sharp softmax", lambda a: (a / 0.01).softmax(1), x),
    ("steep sigmoid", lambda a: (100 * a).sigmoid(), x),
    ("steep softplus", lambda a: F.softplus(a, beta=20), x),
    ("tiny inputs", torch.tanh, x * 1e-8),
    ("huge inputs", lambda a: torch.log1p(a.abs()), x * 1e8),
)
LINEAR_ALGEBRA = table(
    ("slogdet", torch.linalg.slogdet, square + 3 * torch.eye(3)),
    ("logdet", torch.logdet, square @ square.mT + torch.eye(3)),
    ("det", torch.det, square),
    ("cholesky", lambda a: torch.linalg.cholesky(a @ a.mT + torch.eye(3, dtype=a.dtype)), square),
    ("eigenvalues", lambda a: torch.linalg.eigvalsh(a + a.mT), square),
    ("singular values", torch.linalg.svdvals, x),
    ("solve", torch.linalg.solve, (square + 3 * torch.eye(3), normal(3, 2))),
    ("pinv", torch.linalg.pinv, x),
    ("matrix_exp", torch.matrix_exp, square),
    ("qr", lambda a: torch.linalg.qr(a)[1].abs(), normal(4, 3)),
    ("einsum", lambda a, b: torch.einsum("ij,ij->i", a, b), (x, y)),
    ("cdist", torch.cdist, (x, normal(2, 4, seed=4))),
    ("fft", torch.fft.fft, torch.complex(x, y)),
    ("rfft", lambda a: torch.fft.rfft(a).abs(), x),
    ("conjugate", lambda a, b: a * b.conj(), (torch.complex(x, y), torch.complex(y, x))),
)
INDICES = table(
    ("sort", lambda a: a.sort(1)[0], x),
    ("topk", lambda a: a.topk(2, 1)[0], x),
    ("kthvalue", lambda a: a.kthvalue(2, 1)[0], x),
    ("median", lambda a: a.median(1)[0], x),
    ("quantile", lambda a: a.quantile(0.3, 1), x),
    ("cummax", lambda a: a.cummax(1)[0], x),
    ("logcumsumexp", lambda a: a.logcumsumexp(1), x),
    ("gather", lambda a, i: a.gather(1, i), (x, spread)),
    ("index_put", lambda a, b: a.index_put((torch.tensor([0, 2]),), b), (x, normal(2, 4, seed=3))),
    ("scatter_add", lambda a: torch.zeros(3, 4, dtype=a.dtype).scatter_add(1, spread, a[:, :2]), x),
    ("index_add", lambda a, b: a.index_add(0, torch.tensor([0, 0]), b), (x, normal(2, 4, seed=3))),
    ("grid_sample", lambda a, g: F.grid_sample(a, g, align_corners=True), (normal(1, 2, 4, 4), unit(1, 3, 3, 2) * 1.6 - 0.8)),
    ("sparse embedding", lambda w: F.embedding(torch.tensor([[0, 1, 1], [2, 0, 3]]), w, sparse=True), normal(4, 3)),
    ("masked softmax", lambda a: a.masked_fill(torch.tensor([0, 1, 0, 0]).bool(), -torch.inf).softmax(1), x),
    ("causal attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
     (normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2))),
)  # fmt: skip
POINTS = table(
    ("norm of a zero row", lambda a: torch.linalg.vector_norm(a, dim=1), zero_row),
    ("normalize a zero row", F.normalize, zero_row),
    ("erfinv", torch.erfinv, unit(3, 4)),
    ("lgamma of negatives", torch.lgamma, x),
    ("xlogy at 0", torch.xlogy, (torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.5, 2.0]))),
    ("Bessel", torch.special.i0e, x),
    ("log_ndtr", torch.special.log_ndtr, x),
    ("entropy", torch.special.entr, positive(3, 4)),
    ("x^x", lambda a: a**a, positive(3, 4)),
    ("prod with 0", torch.prod, torch.tensor([0.0, 1.0, 2.0])),
    ("x - floor(x)", lambda a: a - a.floor(), x),
    ("remainder", lambda a: torch.remainder(a, 0.7), x),
    ("softmin", lambda a: F.softmin(a, dim=1), x),
    ("Gumbel, fixed noise", lambda a: ((a + noise.to(a.dtype)) / 0.5).softmax(1), x),
    ("Gumbel", lambda a: F.gumbel_softmax(a, dim=1), x),
    ("soft threshold", lambda a: a.sign() * (a.abs() - 0.3).clamp(min=0), x),
)
MODULES = table(
    ("LSTM", nn.LSTM(4, 3, batch_first=True), normal(2, 3, 4)),
    ("LSTM with dropout", nn.LSTM(4, 3, num_layers=2, dropout=0.3), normal(2, 3, 4)),
    ("attention with dropout", nn.MultiheadAttention(4, 2, dropout=0.1), (normal(3, 2, 4),) * 3),
    ("dropout in a sequence", nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 2)), x),
    ("sparse nn.Embedding", nn.Embedding(4, 3, sparse=True), torch.tensor([[0, 1], [1, 2]])),
    ("spectral norm in eval", nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), x),
    ("instance norm", nn.InstanceNorm1d(3), normal(2, 3, 5)),
)


class DeclaredOnce(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


def heron(a: Tensor) -> Tensor:
    """A square root by Heron's steps, which are chaotic below 0."""
    root = torch.ones_like(a)
    for _ in range(30):
        root = (root + a / root) / 2
    return root


def first_row_copied(a: Tensor) -> Tensor:
    b = a * 2
    b[0] = b[1]
    return b.exp()


DECLARED = table(
    ("median", lambda a: a.median(1).values, x),
    ("complex spectrum", torch.fft.rfft, x),
    ("declared once_differentiable", DeclaredOnce.apply, x),
    ("Heron's square root", heron, positive(5)),
    ("a row that is a copy", first_row_copied, x),
    ("polygamma", lambda a: torch.polygamma(1, a), positive(5)),
    ("weight norm", nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), x),
    ("dict of inputs", lambda d: d["a"] * d["b"].sin(), ({"a": x, "b": y},)),
    ("list of inputs", lambda parts, k: torch.cat(parts).tanh() * k, ([x, y], 2)),
    ("a Function of several outputs", lambda a: {"sum": a.sum(0), "parts": [a.sin(), (a.exp(), a.argmax())]}, x),
    ("cosine similarity", lambda a, b: F.cosine_similarity(a, b), (x, y)),
    ("Cox", lambda a: (a - a.logcumsumexp(0)).sum(), x[:, 0]),
)
UNUSUAL = [*DECLARED, *PLAIN, *SCALES, *LINEAR_ALGEBRA, *INDICES, *POINTS, *MODULES]
