"""Forward and backward of functions and losses: torch's against torchcalc's, on the CPU, eager; and of a compiled model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import torchcalc.functional as ours
import torchcalc.nn
from benchmarks.harness import Row, Traffic

F = torch.nn.functional

Call = Callable[..., Tensor]

#: Names whose stock twin is not in torch.nn.functional.
ELSEWHERE: dict[str, Call] = {"square": torch.square, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
ELSEWHERE |= {"exp": torch.exp, "log": torch.log, "abs": torch.abs}
ELSEWHERE |= {"softcap": lambda x, cap=30.0: cap * torch.tanh(x / cap)}
ELSEWHERE |= {
    "swiglu": lambda a, b: F.silu(a) * b,
    "geglu": lambda a, b: F.gelu(a) * b,
    "reglu": lambda a, b: F.relu(a) * b,
}

UNARY = (
    "relu", "sigmoid", "tanh", "square", "gelu", "silu", "mish", "softplus", "elu", "leaky_relu", "logsigmoid", "exp",
    "log", "abs", "softcap",
)  # fmt: skip
LOSSES = (
    "mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy",
    "kl_div", "poisson_nll_loss", "gaussian_nll_loss",
)  # fmt: skip
FASTER = {
    "softplus",
    "mish",
    "elu",
    "swiglu",
    "geglu",
    "reglu",
    "softcap",
}  # of which torch's backward, or torch itself, is composed
#: Logits, and the ratio that is wanted.
CROSS_ENTROPY = {(32, 10): 0.85, (128, 1000): 1.4, (8192, 1024): 2.2, (2048, 32_000): 2.3}
#: (name, shape, dtype, wanted ratio); torch composes rms_norm on CPU.
NORMS: tuple[tuple[str, tuple[int, ...], torch.dtype, float], ...] = (
    ("rms_norm", (32, 64), torch.float32, 1.5),
    ("rms_norm", (4096, 768), torch.float32, 4.0),
    ("rms_norm", (4096, 768), torch.bfloat16, 5.0),
    ("add_rms_norm", (4096, 768), torch.float32, 4.0),
    ("add_rms_norm", (4096, 768), torch.bfloat16, 5.0),
    ("layer_norm", (32, 64), torch.float32, 0.9),
    ("layer_norm", (4096, 768), torch.float32, 0.97),
    ("layer_norm", (4096, 768), torch.bfloat16, 0.97),
    ("group_norm", (32, 64), torch.float32, 0.9),
    ("group_norm", (16, 64, 32, 32), torch.float32, 0.97),
    ("group_norm", (16, 64, 32, 32), torch.bfloat16, 0.97),
)
SIZES = (32, 10_000, 100_000, 1_000_000)


def rows() -> Iterator[Row]:
    """Every function at several sizes; large ones in bfloat16 as well; losses with each reduction."""
    for name in UNARY:
        for size in SIZES:
            yield function_row(name, (size,), torch.float32)
        yield function_row(name, (SIZES[-1],), torch.bfloat16)
    yield function_row("gelu", (SIZES[-1],), torch.float32, " tanh", approximate="tanh")
    for name in ("relu", "leaky_relu", "silu"):
        for size in SIZES[::3]:
            yield in_place_row(name, size)
    yield rows_row("glu", (32, 10))
    for name in ("glu", "swiglu", "geglu", "reglu"):
        yield function_row(name, (32,), torch.float32, inputs=2)
        yield function_row(name, (SIZES[-1],), torch.float32, inputs=2)
    for name in LOSSES:
        yield loss_row(name, (32,), torch.float32, "mean")
        for reduction in ("none", "mean", "sum"):
            yield loss_row(name, (8192, 128), torch.float32, reduction)
        yield loss_row(name, (8192, 128), torch.bfloat16, "mean")
    for shape, target in CROSS_ENTROPY.items():
        yield cross_entropy_row(shape, torch.float32, target)
    yield cross_entropy_row((8192, 1024), torch.bfloat16, 1.0)
    yield cross_entropy_row((8192, 1024), torch.float32, 1.0, " smoothed", label_smoothing=0.1)
    yield cross_entropy_row((4, 21, 128, 128), torch.float32, 1.0)
    yield linear_cross_entropy_row()
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
        yield linear_cross_entropy_row(chunked=True)
    for name in ("softmax", "log_softmax"):
        for shape in ((32, 10), (8192, 1024)):
            yield rows_row(name, shape)
    for norm in NORMS:
        yield norm_row(*norm)
    for sizes in ((32, 16, 32), (4096, 512, 1408)):
        yield linear_row(sizes)
        for name in ("mlp", "gated_mlp"):
            yield block_row(name, sizes)
    for lengths in ((1, 2, 8, 16), (8, 6, 256, 64)):
        yield attention_row(lengths)
    for size in SIZES[::3]:
        yield dropout_row(size)
    for sizes in ((100, 16, 8), (8192, 384, 2048)):
        for scale in (1.0, 2.0):
            yield embedding_row(sizes, scale)
    yield compiled_row()


def pair(name: str, **options: Any) -> tuple[Call, Call]:
    """(stock, ours)."""
    stock = ELSEWHERE.get(name) or getattr(F, name)
    if name == "softcap":
        options = {"cap": 30.0}
    return partial(stock, **options), partial(getattr(ours, name), **options)


def forward_and_backward(f: Call, leaves: list[Tensor], g: Tensor) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        y = f(*leaves)
        y.backward(g)
        results = [y.detach(), *(x.grad for x in leaves if x.grad is not None)]
        for x in leaves:
            x.grad = None
        return results

    return run


def row(
    name: str,
    stock: Call,
    mine: Call,
    inputs: Callable[[], list[Tensor]],
    dtype: torch.dtype,
    incoming: Callable[..., Tensor] = torch.rand,
    **about: Any,
) -> Row:
    def make() -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], None]]:
        leaves = [x.requires_grad_() for x in inputs()]
        y = stock(*leaves)
        g = incoming(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype) if y.dim() else torch.ones_like(y)
        calls = [forward_and_backward(f, leaves, g) for f in (stock, mine)]

        def same() -> None:
            tolerance = 64 * torch.finfo(dtype).eps
            for a, b in zip(*(call() for call in calls), strict=True):
                largest = max(1.0, a.abs().max().item())  # of a sum over many rows, whose terms are as large
                torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * largest)

        return calls[0], calls[1], same

    return Row(name, make=make, group="functions", seconds=1.0, **about)


def named(name: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str = "") -> str:
    return f"{name}{variant}, {'x'.join(map(str, shape))}{'' if dtype == torch.float32 else ', ' + str(dtype)[6:]}"


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def function_row(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, variant: str = "", inputs: int = 1, **options: Any
) -> Row:
    """A function of elements: reads its inputs and writes its value, then reads gradient and inputs and writes theirs."""
    stock, mine = pair(name, **options)
    size = shape[0] * dtype.itemsize

    def make() -> list[Tensor]:
        xs = [values(shape, dtype, k) for k in range(inputs)]
        if name == "glu":  # of halves
            return [torch.cat(xs)]
        return [x.abs() + 0.1 for x in xs] if name == "log" else xs

    large = shape[0] > 10_000
    target = 0.9 if shape[0] <= 32 else 1.2 if name in FASTER and large else 0.97
    traffic = Traffic(size, reads=2 * inputs + 1, writes=1 + inputs) if large else None
    return row(
        named(name, shape, dtype, variant), stock, mine, make, dtype,
        against=f"torch's {name}", traffic=traffic, target=target, quick=shape[0] in (32, SIZES[-1]),
    )  # fmt: skip


def in_place_row(name: str, size: int) -> Row:
    """Over the result of another operation, as in a model."""
    stock, mine = pair(name, inplace=True)
    return row(
        f"{name} in place, {size}", lambda x: stock(x * 1), lambda x: mine(x * 1),
        lambda: [values((size,), torch.float32)], torch.float32,
        against=f"torch's {name}", target=0.97 if size > 32 else 0.9, quick=False,
    )  # fmt: skip


def loss_row(name: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str) -> Row:
    """A loss and the gradient of its input."""
    rest: tuple[Tensor, ...] = (values(shape, dtype, 1).sigmoid(),)
    if name == "gaussian_nll_loss":
        rest = (*rest, rest[0] + 0.5)
    stock, mine = pair(name, reduction=reduction)

    def make() -> list[Tensor]:
        x = values(shape, dtype)
        return [x.sigmoid() * 0.9 + 0.05 if name == "binary_cross_entropy" else x]

    large = len(shape) > 1
    whole = reduction == "none"
    traffic = Traffic(shape[0] * shape[-1] * dtype.itemsize, 5 if whole else 4, 2 if whole else 1) if large else None
    return row(
        named(name, shape, dtype, f" {reduction}"), lambda x: stock(x, *rest), lambda x: mine(x, *rest), make, dtype,
        against=f"torch's {name}", traffic=traffic, target=0.97 if large else 0.9, quick=large and reduction == "mean",
    )  # fmt: skip


def cross_entropy_row(
    shape: tuple[int, ...], dtype: torch.dtype, target: float, variant: str = "", **options: Any
) -> Row:
    """Reads the logits forward, reads them again backward and writes their gradient."""
    stock, mine = pair("cross_entropy", **options)
    t = torch.randint(shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))
    size = torch.Size(shape).numel() * dtype.itemsize
    return row(
        named("cross_entropy", shape, dtype, variant), lambda x: stock(x, t), lambda x: mine(x, t),
        lambda: [values(shape, dtype)], dtype, against="torch's cross_entropy",
        traffic=Traffic(size, reads=2, writes=1) if size > 1 << 20 else None, target=target, quick=shape[0] < 1000,
    )  # fmt: skip


def linear_cross_entropy_row(chunked: bool = False) -> Row:
    """The head of a language model: 2048 tokens, 512 features, 32,000 words; against torch's parts, or its own chunks."""
    t = torch.randint(32_000, (2048,), generator=torch.Generator().manual_seed(1))

    def stock(x: Tensor, w: Tensor) -> Tensor:
        if chunked:
            return F.linear_cross_entropy(x, w, t, options=torch.nn.LinearCrossEntropyOptions())
        return F.cross_entropy(F.linear(x, w), t)

    made = row(
        f"linear_cross_entropy, 2048x512x32000{', chunked' if chunked else ''}", stock,
        lambda x, w: ours.linear_cross_entropy(x, w, t),
        lambda: [values((2048, 512), torch.float32), values((32_000, 512), torch.float32, 2) / 20], torch.float32,
        against=f"torch's {'chunked linear_cross_entropy' if chunked else 'linear and cross_entropy'}",
        target=2.5 if chunked else 1.7, quick=False,
    )  # fmt: skip
    made.seconds = 20.0
    return made


def rows_row(name: str, shape: tuple[int, ...]) -> Row:
    stock, mine = pair(name, dim=1)
    return row(
        named(name, shape, torch.float32), stock, mine, lambda: [values(shape, torch.float32)], torch.float32,
        against=f"torch's {name}", target=0.9 if shape[0] <= 32 else 0.97, quick=shape[0] <= 32,
    )  # fmt: skip


def norm_row(name: str, shape: tuple[int, ...], dtype: torch.dtype, target: float) -> Row:
    """With a weight, and a bias where there is one: forward reads x and writes y, backward reads x and g and writes x's
    gradient; add_rms_norm has one more of each but g."""
    size = torch.Size(shape).numel() * dtype.itemsize
    inputs = 2 if name == "add_rms_norm" else 1
    parameters = 2 if name in ("layer_norm", "group_norm") else 1
    how: Any = 8 if name == "group_norm" else shape[1:]

    def composed(x: Tensor, a: Tensor, w: Tensor) -> Tensor:
        s = x + a
        return F.rms_norm(s, how, w) + s

    def mine(*leaves: Tensor) -> Tensor:
        if name == "add_rms_norm":
            x, a, w = leaves
            y, s = ours.add_rms_norm(x, a, how, w)
            return y + s
        x, *rest = leaves
        f: Call = getattr(ours, name)
        return f(x, how, *rest)

    def stock(*leaves: Tensor) -> Tensor:
        x, *rest = leaves
        f: Call = getattr(F, name)
        return f(x, how, *rest)

    def make() -> list[Tensor]:
        xs = [values(shape, dtype, k) for k in range(inputs)]
        return xs + [values(shape[1:2], dtype, 3 + k) for k in range(parameters)]

    return row(
        named(name, shape, dtype), composed if name == "add_rms_norm" else stock, mine, make, dtype,
        torch.randn,  # of numbers all of one sign torch's sum in bfloat16, the gradient of a bias, comes to a stop
        against="torch's rms_norm of a sum" if inputs == 2 else f"torch's {name}",
        traffic=Traffic(size, reads=3, writes=2) if inputs == 1 and size > 1 << 20 else None, target=target,
        quick=shape[0] <= 32,
    )  # fmt: skip


def linear_row(sizes: tuple[int, int, int]) -> Row:
    """Samples, inputs and outputs; a layer with a bias."""
    n, d, o = sizes
    stock, mine = pair("linear")
    return row(
        f"linear, {n}x{d}x{o}", stock, mine,
        lambda: [values((n, d), torch.float32), values((o, d), torch.float32, 1) / d**0.5, values((o,), torch.float32, 2)],
        torch.float32, against="torch's linear", target=0.97 if n > 32 else 0.9, quick=n <= 32,
    )  # fmt: skip


def block_row(name: str, shape: tuple[int, ...]) -> Row:
    """Samples, features, hidden features, without biases; torch's side is written with its operations."""
    n, d, h = shape
    weights = [(h, d), (h, d), (d, h)] if name == "gated_mlp" else [(h, d), (d, h)]

    def stock(x: Tensor, *w: Tensor) -> Tensor:
        if name == "gated_mlp":
            return F.linear(F.silu(F.linear(x, w[0])) * F.linear(x, w[1]), w[2])
        return F.linear(F.gelu(F.linear(x, w[0])), w[1])

    return row(
        named(name, shape, torch.float32), stock, getattr(ours, name),
        lambda: [values((n, d), torch.float32), *(values(w, torch.float32, k) / w[1] ** 0.5 for k, w in enumerate(weights))],
        torch.float32, torch.randn, against="torch's linear and activation",
        target=0.9 if n <= 32 else 1.05 if name == "gated_mlp" else 0.97, quick=n <= 32,
    )  # fmt: skip


def attention_row(shape: tuple[int, ...]) -> Row:
    """Batch, heads, length, features; causal. The kernel is torch's."""
    stock, mine = pair("scaled_dot_product_attention", is_causal=True)
    return row(
        named("scaled_dot_product_attention", shape, torch.float32), stock, mine,
        lambda: [values(shape, torch.float32, k) for k in range(3)], torch.float32, torch.randn,
        against="torch's scaled_dot_product_attention", target=0.9 if shape[2] <= 32 else 0.97, quick=shape[2] <= 32,
    )  # fmt: skip


def dropout_row(size: int) -> Row:
    """For the same random numbers."""

    def seeded(f: Call) -> Call:
        def call(x: Tensor) -> Tensor:
            torch.manual_seed(0)
            return f(x, 0.1)

        return call

    return row(
        named("dropout", (size,), torch.float32), seeded(F.dropout), seeded(ours.dropout),
        lambda: [values((size,), torch.float32)], torch.float32,
        against="torch's dropout", target=0.9 if size <= 32 else 0.97, quick=size <= 32,
    )  # fmt: skip


def embedding_row(shape: tuple[int, ...], scale: float) -> Row:
    """Rows, features, indices; with a scale torch multiplies afterwards."""
    words, d, n = shape
    index = torch.randint(words, (n,), generator=torch.Generator().manual_seed(1))

    def stock(w: Tensor) -> Tensor:
        y = F.embedding(index, w)
        return y if scale == 1 else y * scale

    return row(
        named("embedding", shape, torch.float32, "" if scale == 1 else " scaled"), stock,
        lambda w: ours.embedding(index, w, scale=scale), lambda: [values((words, d), torch.float32)], torch.float32,
        torch.randn, against="torch's embedding", target=0.9 if n <= 32 else 0.97, quick=n <= 32,
    )  # fmt: skip


def compiled_row() -> Row:
    """torch.compile of a classifier with our parts beside the same of stock parts."""

    def model(parts: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            parts.Linear(256, 1024), parts.GELU(), parts.Linear(1024, 1024), parts.ReLU(), parts.Linear(1024, 4096)
        )

    def make() -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], None]]:
        x, t = values((512, 256), torch.float32), torch.randint(4096, (512,))
        calls, losses = [], []
        for parts in (torch.nn, torchcalc.nn):
            net, criterion = model(parts), parts.CrossEntropyLoss()

            @torch.compile
            def loss(net: torch.nn.Module = net, criterion: torch.nn.Module = criterion) -> Tensor:
                return criterion(net(x), t)

            def run(loss: Callable[[], Tensor] = loss, net: torch.nn.Module = net) -> Tensor:
                value = loss()
                value.backward()
                net.zero_grad()
                return value.detach()

            calls.append(run)
            losses.append(run())

        def same() -> None:
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)

        return calls[0], calls[1], same

    return Row(
        "compiled classifier, forward and backward", "the same of torch's parts, compiled", make,
        target=0.97, group="compiled", seconds=6.0, quick=False,
    )  # fmt: skip
