"""The table of functions: each row names one of ours, its stock twin, and inputs; tests/checks.py checks the rows.

A new function is one row here and a test file with ``@table("name")``.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import torchcalc.functional as ours
from tests import checks, stock

Inputs = tuple[Tensor | None, ...]
REDUCTIONS = ("none", "mean", "sum")
inf, nan = torch.inf, torch.nan


@dataclass(frozen=True)
class Row:
    """One variant of a function, as a function of tensors alone."""

    name: str
    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    inputs: Callable[[], Inputs]  # float64, small enough for numerical derivatives, away from kinks
    grads: tuple[int, ...] = (0,)  # inputs whose derivative torch has too
    ours_only: tuple[int, ...] = ()  # inputs whose derivative torch refuses
    edges: tuple[Callable[[], Inputs], ...] = ()  # further shapes: empty, 0-d, more dimensions, broadcast
    special: Callable[[], Inputs] | None = None  # NaN, infinities, kinks, huge numbers
    reference: Callable[..., Tensor] | None = None  # what is right where stock is not, for the report
    autocast: bool = True  # False: differs from torch there, and says so; its own test covers it
    half: bool = True  # False: the row has its own dtype
    half_stock: Callable[..., Tensor] | None = None  # whose error in 16 bits is allowed, where it is not the twin's
    reported: bool = True  # False: the twin is another function at some special values; its own test has the report
    inductor: bool = False  # compile with inductor too, which takes seconds


#: Where the inputs are: `make test-cuda` says "cuda".
DEVICE = os.environ.get("TORCHCALC_TEST_DEVICE", "cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.8 + 0.1
    return numbers.to(DEVICE)


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).softmax(0 if len(shape) == 1 else 1)


def classes(*shape: int, high: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def line(repeat: int = 3) -> Tensor:
    """Every special number, often enough for torch's vectorised loops and their scalar tails."""
    return torch.tensor(
        [nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 1e300, -1e300, 1e-300, 30.0, -30.0, 0.5] * repeat,
        dtype=torch.float64,
        device=DEVICE,
    )


def elementwise(
    name: str,
    stock: Callable[..., Tensor],
    variant: str = "",
    complex: bool = False,
    inputs: Callable[..., Tensor] = normal,
    reference: Callable[..., Tensor] | None = None,
    **options: object,
) -> Row:
    f = getattr(ours, name)
    edges = [lambda: (inputs(0, 3),), lambda: (inputs(),), lambda: (inputs(2, 1, 3, 1, 2),)]
    if complex:
        edges.append(lambda: (torch.complex(normal(4), normal(4, seed=1)),))
    return Row(
        name + variant,
        partial(f, **options) if options else f,
        partial(stock, **options) if options else stock,
        inputs=lambda: (inputs(3, 4),),
        edges=tuple(edges),
        special=lambda: (line(),),
        reference=partial(reference, **options) if reference else None,
        inductor=name in ("gelu", "mish"),
    )


ACTIVATIONS = [
    elementwise("square", torch.square, complex=True),
    elementwise("sigmoid", torch.sigmoid, complex=True),
    elementwise("tanh", torch.tanh, complex=True),
    elementwise("relu", torch.nn.functional.relu),
    elementwise("gelu", torch.nn.functional.gelu),
    elementwise("gelu", torch.nn.functional.gelu, " tanh", approximate="tanh"),
    elementwise("exp", torch.exp, complex=True),
    elementwise("log", torch.log, complex=True, inputs=uniform),
    elementwise("abs", torch.abs, complex=True),
    elementwise("silu", torch.nn.functional.silu),
    elementwise("mish", torch.nn.functional.mish),
    elementwise("softplus", torch.nn.functional.softplus),
    elementwise("softplus", torch.nn.functional.softplus, " threshold", beta=2.5, threshold=1.0),
    elementwise("elu", stock.elu),
    elementwise("elu", stock.elu, " alpha", alpha=0.3),
    elementwise("softcap", stock.softcap, cap=2.0),
    elementwise("leaky_relu", torch.nn.functional.leaky_relu),
    elementwise("leaky_relu", torch.nn.functional.leaky_relu, " slope", negative_slope=0.3),
    elementwise("logsigmoid", torch.nn.functional.logsigmoid),
]


def gated(name: str, stock: Callable[..., Tensor], variant: str = "", **options: object) -> Row:
    """A gate of two tensors; torch composes it, and rounds twice."""
    shapes = ((0, 3), (), (2, 1, 3, 1, 2))
    return Row(
        name + variant,
        partial(getattr(ours, name), **options),
        stock,
        inputs=lambda: (normal(3, 4), normal(3, 4, seed=1)),
        grads=(0, 1),
        edges=(
            *(lambda shape=shape: (normal(*shape), normal(*shape, seed=1)) for shape in shapes),
            lambda: (normal(3, 1), normal(4, seed=1)),
        ),
        special=lambda: (line(), line().roll(7)),
        inductor=name == "swiglu",
    )


def halves(x: Tensor, dim: int = -1) -> Tensor:
    """torch's glu by its definition, since torch cannot differentiate the forward mode of its own."""
    a, b = x.chunk(2, dim)
    return wide(lambda a, b: a * b.sigmoid(), a, b)


def wide(f: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """f in float32 if the inputs are halves, rounded once."""
    half = inputs[0].dtype in (torch.bfloat16, torch.float16)
    return f(*(x.float() for x in inputs)).to(inputs[0].dtype) if half else f(*inputs)


ACTIVATIONS += [
    Row(
        "glu",
        ours.glu,
        halves,
        inputs=lambda: (normal(3, 4),),
        edges=(
            lambda: (normal(0, 4),),
            lambda: (normal(6),),
            lambda: (normal(2, 3, 0),),
            lambda: (normal(2, 1, 3, 2),),
        ),
        special=lambda: (torch.cat([line(), line().roll(7)]),),
    ),
    Row(
        "glu dim",
        partial(ours.glu, dim=0),
        partial(halves, dim=0),
        inputs=lambda: (normal(4, 3),),
        edges=(lambda: (normal(6),), lambda: (normal(2, 3, 4),), lambda: (normal(0, 3),)),
    ),
    gated("swiglu", partial(wide, lambda a, b: torch.nn.functional.silu(a) * b)),
    gated("geglu", partial(wide, lambda a, b: torch.nn.functional.gelu(a) * b)),
    gated(
        "geglu",
        partial(wide, lambda a, b: torch.nn.functional.gelu(a, approximate="tanh") * b),
        " tanh",
        approximate="tanh",
    ),
    gated("reglu", partial(wide, lambda a, b: torch.nn.functional.relu(a) * b)),
]


def along(name: str, variant: str = "", **options: object) -> Row:
    return Row(
        f"{name}{variant}",
        partial(getattr(ours, name), **options),
        partial(getattr(torch.nn.functional, name), **options),
        inputs=lambda: (normal(3, 4),),
        edges=(lambda: (normal(0, 3),), lambda: (normal(3, 0, 2),), lambda: (normal(2, 3, 4),)),
        special=lambda: (torch.stack([line(), line() * 0, line().nan_to_num(0, 1e4, -inf), line().clamp(-1e4, 1e4)]),),
        autocast="dtype" not in options,
        half="dtype" not in options,
        inductor=name == "log_softmax",
    )


def composed_norm(
    x: Tensor,
    dims: list[int],
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    view: tuple[int, ...] = (),
    groups: int = 0,
) -> Tensor:
    """torch's layer_norm and group_norm by their definition: their own second derivatives are wrong in places, see
    layers/test_layer_norm.py, and group_norm's first ones in others."""

    def f(x: Tensor, *parameters: Tensor) -> Tensor:
        rest = list(parameters)
        rows = x.reshape(x.shape[0], groups, x.shape[1:].numel() // groups) if groups else x
        centred = rows - rows.mean(dims, keepdim=True)
        y = (centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()).reshape(x.shape)
        y = y if w is None else y * rest.pop(0).view(view or w.shape)
        return y if b is None else y + rest.pop(0).view(view or b.shape)

    return wide(f, x, *(p for p in (w, b) if p is not None))


#: Whether torch's autocast takes rms_norm to float32, as it has layer_norm since long, and as we do with every torch.
RMS_NORM_IS_AUTOCAST = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def norm(name: str, variant: str, shape: tuple[int, ...], eps: float | None) -> Row:
    """A norm over the last dimensions; layer_norm has a bias."""
    count = 2 if name == "rms_norm" else 3

    def parameters(shape: tuple[int, ...]) -> Inputs:
        return tuple(normal(*shape, seed=k) for k in range(1, count))

    def call(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *parameters: f(x, x.shape[x.dim() - len(shape) :], *parameters, eps=eps)

    def special() -> Inputs:
        rows = [line(1), line(1).nan_to_num(0, 1e4, -inf), line(1).clamp(-1e4, 1e4).nan_to_num(0), line(1) * 0]
        x = torch.stack(rows)[(slice(None), *[None] * (len(shape) - 1))]
        return x, *parameters(tuple(x.shape[x.dim() - len(shape) :]))

    def composed(x: Tensor, size: torch.Size, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        return composed_norm(x, list(range(x.dim() - len(size), x.dim())), w, b, eps)

    edges = [lambda lead=lead: (normal(*lead, *shape), *parameters(shape)) for lead in ((), (0,), (2, 1, 3), (1, 1))]
    edges += [lambda: (normal(2, *shape), *[None] * (count - 1))]
    edges += [lambda: (normal(2, *shape[:-1], 0), *parameters((*shape[:-1], 0)))]
    if name == "rms_norm":
        edges += [lambda: tuple(torch.complex(normal(*s), normal(*s, seed=3)) for s in ((2, *shape), shape))]
    else:
        edges += [
            lambda: (normal(2, *shape), parameters(shape)[0], None),
            lambda: (normal(2, *shape), None, normal(*shape)),
        ]
    return Row(
        f"{name}{variant}",
        call(getattr(ours, name)),
        call(torch.nn.functional.rms_norm if name == "rms_norm" else composed),
        inputs=lambda: (normal(3, *shape), *parameters(shape)),
        grads=tuple(range(count)),
        edges=tuple(edges),
        special=special,
        autocast=name == "rms_norm" and RMS_NORM_IS_AUTOCAST,
        inductor=not variant,
    )


def group_norm(variant: str, groups: int) -> Row:
    def stock(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return composed_norm(x, [2], w, b, 1e-3, (-1, *[1] * (x.dim() - 2)), groups)

    def parameters() -> Inputs:
        return normal(4, seed=1), normal(4, seed=2)

    return Row(
        f"group_norm{variant}",
        lambda x, w, b: ours.group_norm(x, groups, w, b, eps=1e-3),
        stock,
        inputs=lambda: (normal(2, 4, 3), *parameters()),
        grads=(0, 1, 2),
        edges=(
            lambda: (normal(2, 4), *parameters()),
            lambda: (normal(0, 4, 2), *parameters()),
            lambda: (normal(1, 4, 2, 1, 3), *parameters()),
            lambda: (normal(2, 4, 2, 3), None, None),
            lambda: (normal(2, 4, 2, 3).to(memory_format=torch.channels_last), normal(4, seed=1), None),
            lambda: (normal(2, 4, 2, 3), None, normal(4, seed=1)),
        ),
        special=lambda: (torch.stack([line(1)[:12], line(1)[3:].clamp(-1e4, 1e4)]).view(2, 4, 3), *parameters()),
        reference=lambda x, w, b: torch.nn.functional.group_norm(x, groups, w, b, eps=1e-3),  # NaN where x² overflows
        # The kernel on CUDA keeps mean and 1/σ in 16 bits.
        half_stock=(lambda x, w, b: torch.nn.functional.group_norm(x, groups, w, b, 1e-3))
        if DEVICE == "cuda"
        else None,
        autocast=False,
        inductor=groups == 2,
    )


def add_rms_norm() -> Row:
    """Both results, one beside the other; in 16 bits torch's sum is rounded as ours is."""

    def stock(x: Tensor, a: Tensor, w: Tensor | None) -> Tensor:
        s = x + a
        return torch.stack([torch.nn.functional.rms_norm(s, s.shape[-1:], w, 1e-3), s])

    return Row(
        "add_rms_norm",
        lambda x, a, w: torch.stack(ours.add_rms_norm(x, a, (x + a).shape[-1:], w, 1e-3)),
        stock,
        inputs=lambda: (normal(3, 4), normal(3, 4, seed=1), normal(4, seed=2)),
        grads=(0, 1, 2),
        autocast=RMS_NORM_IS_AUTOCAST,
        edges=(
            lambda: (normal(4), normal(4, seed=1), None),
            lambda: (normal(0, 4), normal(0, 4, seed=1), normal(4, seed=2)),
            lambda: (normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(4, seed=2)),
            lambda: (normal(3, 4), normal(4, seed=1), normal(4, seed=2)),
        ),
        special=lambda: (torch.stack([line(1), line(1) * 0]), torch.stack([line(1).roll(7), line(1)]), normal(15)),
        inductor=True,
    )


def attention(variant: str, keys: int = 4, mask: str = "", heads: int = 2, **options: bool) -> Row:
    """Against the definition, since torch's kernels have no second derivatives; in 16 bits against torch's kernel."""

    def seen() -> Tensor | None:
        """The last key is hidden from all but the first query, and the second query sees none."""
        visible = torch.ones(3, keys, dtype=torch.bool, device=DEVICE)
        visible[1:, -1] = visible[1] = False
        return visible if mask == "bool" else None

    def definition(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None = None) -> Tensor:
        def f(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
            if options.get("enable_gqa"):
                k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
            s = q @ k.mT / math.sqrt(q.shape[-1])
            for added in more:
                s = s + added
            visible = seen()
            if options.get("is_causal"):
                visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
            if visible is not None:
                s = s.masked_fill(~visible, -inf)
            nothing = (s == -inf).all(-1, keepdim=True)
            return s.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0) @ v

        return wide(f, q, k, v, *(() if m is None else (m,)))

    def call(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, m=None: f(q, k, v, seen() if m is None else m, **options)

    def inputs(*lead: int, length: int = 3, features: int = 8) -> Inputs:
        given = (
            normal(*lead, heads, length, features),
            normal(*lead, 2, keys, features, seed=1),
            normal(*lead, 2, keys, features, seed=2),
        )
        return (*given, normal(*lead[:1], 1, length, keys, seed=3)) if mask == "added" else given

    return Row(
        f"scaled_dot_product_attention{variant}",
        call(ours.scaled_dot_product_attention),
        definition,
        inputs=lambda: inputs(2, features=2),
        grads=(0, 1, 2, 3) if mask == "added" else (0, 1, 2),
        edges=(lambda: inputs(1), lambda: inputs(1, 1), lambda: inputs(), lambda: inputs(2, features=3)),
        half_stock=call(torch.nn.functional.scaled_dot_product_attention),
        inductor=not variant,
    )


def feed_forward(name: str, variant: str, activation: str, biases: bool, recompute: bool = False) -> Row:
    f = getattr(torch.nn.functional, activation.removesuffix("_tanh"))
    f = partial(f, approximate="tanh") if activation.endswith("_tanh") else f
    linear = torch.nn.functional.linear

    def block(x: Tensor, *parts: Tensor | None) -> Tensor:
        if name == "mlp":
            w, w_down, b, b_down = parts
            return linear(f(linear(x, w, b)), w_down, b_down)
        w, w_up, w_down, b, b_up, b_down = parts
        return linear(f(linear(x, w, b)) * linear(x, w_up, b_up), w_down, b_down)

    def inputs(*lead: int) -> Inputs:
        weights = ((5, 4), (2, 5)) if name == "mlp" else ((5, 4), (5, 4), (2, 5))
        given = [normal(*shape, seed=1 + k) / 2 for k, shape in enumerate(weights)]
        given += [normal(shape[0], seed=5 + k) if biases else None for k, shape in enumerate(weights)]
        return normal(*lead, 4), *given

    count = 2 if name == "mlp" else 3
    return Row(
        f"{name}{variant}",
        partial(getattr(ours, name), activation=activation, recompute=recompute),
        block,
        inputs=lambda: inputs(3),
        grads=tuple(range(1 + count * (1 + biases))),
        edges=(lambda: inputs(), lambda: inputs(2, 3), lambda: inputs(0), lambda: inputs(2, 1, 2)),
        half=False,  # of so few numbers the roundings are a coin toss: layers/test_mlp.py has more
        inductor=not variant,
    )


LAYERS = [
    *(
        attention(variant, **how)
        for variant, how in {
            "": {},
            " causal": {"keys": 3, "is_causal": True},
            " mask": {"mask": "bool"},
            " added mask": {"mask": "added"},
            " grouped": {"heads": 4, "enable_gqa": True},
        }.items()
    ),
    feed_forward("mlp", "", "gelu", True),
    feed_forward("mlp", " recomputed", "silu", False, recompute=True),
    feed_forward("mlp", " tanh", "tanh", True),
    feed_forward("gated_mlp", "", "silu", False),
    feed_forward("gated_mlp", " with biases", "gelu_tanh", True),
    feed_forward("gated_mlp", " recomputed", "gelu", False, recompute=True),
    Row(
        "embedding",
        lambda w, index: ours.embedding(index, w),
        lambda w, index: torch.nn.functional.embedding(index, w),
        inputs=lambda: (normal(5, 3), classes(4, high=5)),
        edges=(lambda: (normal(5, 3), classes(2, 3, high=5)), lambda: (normal(5, 3), classes(high=5))),
        inductor=True,
    ),
    Row(
        "embedding scaled",
        lambda w, index: ours.embedding(index, w, scale=3.0),
        lambda w, index: torch.nn.functional.embedding(index, w) * 3,
        inputs=lambda: (normal(5, 3), classes(4, high=5)),
    ),
    Row(
        "linear",
        ours.linear,
        torch.nn.functional.linear,
        inputs=lambda: (normal(3, 4), normal(2, 4, seed=1), normal(2, seed=2)),
        grads=(0, 1, 2),
        edges=(
            lambda: (normal(3, 4), normal(2, 4, seed=1), None),
            lambda: (normal(4), normal(2, 4, seed=1), normal(2, seed=2)),
            lambda: (normal(2, 3, 4), normal(5, 4, seed=1), normal(5, seed=2)),
            lambda: (normal(0, 4), normal(2, 4, seed=1), normal(2, seed=2)),
            lambda: (normal(3, 0), normal(2, 0, seed=1), normal(2, seed=2)),
            lambda: (normal(3, 4), normal(0, 4, seed=1), normal(0, seed=2)),
            lambda: (normal(2, 3, 4), normal(4, seed=1), None),
            lambda: (normal(4), normal(4, seed=1), None),
            lambda: (normal(3, 4), normal(2, 4, seed=1), normal(seed=2)),
            lambda: (normal(3, 4), normal(2, 4, seed=1), normal(3, 1, seed=2)),
            lambda: tuple(torch.complex(normal(*s), normal(*s, seed=3)) for s in ((3, 4), (2, 4), (2,))),
        ),
        special=lambda: (torch.stack([line(1), line(1).nan_to_num(0, 1, 2)]), normal(2, 15), normal(2)),
        inductor=True,
    ),
    *(norm("rms_norm", v, shape, eps=eps) for v, shape, eps in (("", (4,), None), (" two dimensions", (3, 4), 0.1))),
    *(norm("layer_norm", v, shape, eps=eps) for v, shape, eps in (("", (4,), 1e-5), (" two dimensions", (3, 4), 0.1))),
    *(group_norm(f" {groups}", groups) for groups in (1, 2, 4)),
    add_rms_norm(),
    along("softmax", dim=1),
    along("softmax", " first", dim=0),
    along("softmax", " dtype", dim=-1, dtype=torch.float64),
    along("log_softmax", dim=1),
    along("log_softmax", " first", dim=0),
    along("log_softmax", " dtype", dim=-1, dtype=torch.float64),
]


def pair(name: str, variant: str = "", special: bool = True, edges: bool = True, **options: object) -> Row:
    """A loss of input and target of one shape."""
    target = uniform if name.startswith("binary") else normal
    broadcasts = () if name.startswith("binary") else (lambda: (normal(3, 1), target(4, seed=1)),)
    shapes = ((0, 3), (), (2, 3, 1, 2))
    return Row(
        f"{name}{variant}",
        partial(getattr(ours, name), **options),
        partial(getattr(torch.nn.functional, name), **options),
        inputs=lambda: (normal(3, 4), target(3, 4, seed=1)),
        grads=(0, 1),
        edges=(*(lambda shape=shape: (normal(*shape), target(*shape, seed=1)) for shape in shapes), *broadcasts)
        if edges
        else (),
        special=(lambda: (line(), line().roll(7).nan_to_num(0, 1, 1))) if special else None,
        reference=partial(certain, **options) if name == "binary_cross_entropy_with_logits" else None,
        inductor=variant == " mean",
    )


def weighted(name: str, reduction: str, **options: object) -> Row:
    """A loss of (input, target, weight); torch's autocast leaves out the product with the weight."""

    def call(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, t, w: f(x, t, weight=w, reduction=reduction, **options)

    return Row(
        f"{name} weight {reduction}",
        call(getattr(ours, name)),
        call(getattr(torch.nn.functional, name)),
        inputs=lambda: (normal(3, 4), normal(3, 4, seed=1), uniform(3, 4, seed=2)),
        grads=(0, 1, 2),
        edges=(
            lambda: (normal(0, 3), normal(0, 3, seed=1), uniform(0, 3, seed=2)),
            lambda: (normal(), normal(seed=1), uniform(seed=2)),
            lambda: (normal(3, 1), normal(3, 4, seed=1), uniform(3, 1, seed=2)),
            lambda: (normal(4), normal(3, 1, seed=1), uniform(4, seed=2)),
        ),
        special=lambda: (line(), line().roll(7), uniform(45)),
        autocast=False,
    )


def probability(variant: str, weight: Callable[[], Tensor | None] = lambda: None, **options: object) -> Row:
    """Binary cross-entropy of probabilities, against its definition: torch's second derivatives are off by 10⁻¹²."""

    def mine(q: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        return ours.binary_cross_entropy(q, t, w, **options)

    def stock(q: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        def reduced(q: Tensor, t: Tensor, *w: Tensor) -> Tensor:
            loss = (t - 1) * (1 - q).log().clamp(min=-100) - t * q.log().clamp(min=-100)
            loss = loss * w[0] if w else loss
            return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[str(options["reduction"])]

        return wide(reduced, q, t, *(() if w is None else (w,)))

    return Row(
        f"binary_cross_entropy {variant}",
        mine,
        stock,
        inputs=lambda: (uniform(3, 4), uniform(3, 4, seed=1), weight()),
        grads=(0, 1),
        ours_only=() if weight() is None else (2,),
        edges=(
            lambda: (uniform(0, 3), uniform(0, 3, seed=1), None),
            lambda: (uniform(), uniform(seed=1), None),
            lambda: (uniform(2, 3, 1, 2), uniform(2, 3, 1, 2, seed=1), None),
        ),
        autocast=False,
        reported=False,
        inductor=variant == "mean",
    )


def likelihood(
    name: str,
    variant: str,
    target: Callable[..., Tensor],
    inputs: Callable[..., Tensor] = normal,
    stock: Callable[..., Tensor] | None = None,
    **options: object,
) -> Row:
    """A loss of input and target that broadcasts without a warning."""
    shapes = ((0, 3), (), (2, 3, 1, 2))
    return Row(
        f"{name} {variant}",
        partial(getattr(ours, name), **options),
        partial(stock or getattr(torch.nn.functional, name), **options),
        inputs=lambda: (inputs(3, 4), target(3, 4, seed=1)),
        grads=(0, 1),
        edges=(
            *(lambda shape=shape: (inputs(*shape), target(*shape, seed=1)) for shape in shapes),
            lambda: (inputs(3, 1), target(4, seed=1)),
        ),
        inductor=variant == "sum",
    )


def counts(*shape: int, seed: int = 0) -> Tensor:
    """Of both kinds, below 1 and above; not whole, so that derivatives are tried."""
    return uniform(*shape, seed=seed) * 4


def gaussian(variant: str, var: Callable[[], Tensor] = lambda: uniform(3, 4, seed=2), **options: object) -> Row:
    """Against torch's distribution: torch's loss looks at the sign of v, which no transform passes."""

    def stock(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        def reduced(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
            loss = -torch.distributions.Normal(x, v.sqrt(), validate_args=False).log_prob(t)
            loss = loss - (0.0 if options.get("full") else 0.5 * math.log(2 * math.pi))
            return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[str(options.get("reduction", "mean"))]

        return wide(reduced, x, t, v if v.dim() == x.dim() else v.unsqueeze(-1))

    return Row(
        f"gaussian_nll_loss {variant}",
        partial(ours.gaussian_nll_loss, **options),
        stock,
        inputs=lambda: (uniform(3, 4), normal(3, 4, seed=1), var()),
        grads=(0, 1, 2),
        edges=(
            lambda: (normal(0, 3), normal(0, 3, seed=1), uniform(0, 3)),
            lambda: (normal(), normal(seed=1), uniform()),
            lambda: (normal(2, 3, 4), normal(2, 3, 4, seed=1), uniform(2, 1, 4)),
        ),
        reference=partial(
            torch.nn.functional.gaussian_nll_loss, **options
        ),  # which has a least v, and its slope below it
        autocast=False,
        inductor=variant == "mean",
    )


def certain(x: Tensor, t: Tensor, weight: Any = None, pos_weight: Any = None, reduction: str = "mean") -> Tensor:
    """binary_cross_entropy_with_logits where 0·∞ = 0; torch's is NaN at infinite logits."""
    p = 1.0 if pos_weight is None else pos_weight
    log_sigmoid = torch.nn.functional.logsigmoid
    yes, no = p * t, 1 - t
    losses = torch.where(yes == 0, 0.0, -yes * log_sigmoid(x)) + torch.where(no == 0, 0.0, -no * log_sigmoid(-x))
    losses = losses if weight is None else losses * weight
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def bce(reduction: str, weight: Callable[[], Tensor | None], pos_weight: Callable[[], Tensor | None]) -> Row:
    def call(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, t, w, p: f(x, t, weight=w, pos_weight=p, reduction=reduction)

    w, p = weight(), pos_weight()
    given = tuple(i for i, a in ((2, w), (3, p)) if a is not None)
    return Row(
        f"binary_cross_entropy_with_logits {reduction} {[a is not None and list(a.shape) for a in (w, p)]}",
        call(ours.binary_cross_entropy_with_logits),
        call(torch.nn.functional.binary_cross_entropy_with_logits),
        inputs=lambda: (normal(3, 4), uniform(3, 4, seed=1), weight(), pos_weight()),
        grads=(0, 1),
        ours_only=given,
        reference=call(certain),
    )


def cross_entropy(
    variant: str,
    target: Callable[[], Tensor],
    weight: Callable[[], Tensor | None] = lambda: None,
    shape: tuple[int, ...] = (5, 3),
    edges: tuple[Callable[[], Inputs], ...] = (),
    special: bool = False,
    **options: object,
) -> Row:
    def call(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, t, w: f(x, t, w, **options)

    soft = target().is_floating_point()
    rows = [
        line(1),
        line(1).nan_to_num(0, 1e4, -inf),
        line(1).nan_to_num(0, 1e4, -1e4),
        line(1) * 0,
        line(1).clamp(-inf, 1e4),
    ]
    t = probabilities(5, 15) if soft else classes(5, high=15)
    return Row(
        f"cross_entropy {variant}",
        call(ours.cross_entropy),
        call(torch.nn.functional.cross_entropy),
        inputs=lambda: (normal(*shape), target(), weight()),
        grads=(0, 1) if soft and weight() is None else (0, 1, 2) if soft else (0,),
        edges=edges,
        special=(lambda: (torch.stack(rows), t, None)) if special else None,
        inductor=variant in ("classes mean", "probabilities mean"),
    )


def some(*shape: int) -> Callable[[], Tensor]:
    return lambda: uniform(*shape, seed=5)


def nothing() -> None:
    return None


LOSSES = [
    *(pair("mse_loss", f" {r}", reduction=r) for r in REDUCTIONS),
    *(weighted("mse_loss", r) for r in REDUCTIONS),
    *(pair("l1_loss", f" {r}", reduction=r) for r in REDUCTIONS),
    *(weighted("l1_loss", r) for r in REDUCTIONS),
    *(pair("huber_loss", f" {r}", reduction=r) for r in REDUCTIONS),
    pair("huber_loss", " delta", reduction="mean", delta=0.3),
    *(weighted("huber_loss", r, delta=0.7) for r in REDUCTIONS),
    *(pair("smooth_l1_loss", f" {r}", reduction=r) for r in REDUCTIONS),
    pair("smooth_l1_loss", " beta", reduction="mean", beta=0.3),
    pair("smooth_l1_loss", " of 0", reduction="mean", beta=0),
    *(probability(r, reduction=r) for r in REDUCTIONS),
    *(probability(f"weight {r}", lambda: uniform(4, seed=2), reduction=r) for r in REDUCTIONS),
    *(likelihood("kl_div", r, uniform, reduction=r) for r in (*REDUCTIONS, "batchmean")),
    *(likelihood("kl_div", f"log {r}", normal, reduction=r, log_target=True) for r in (*REDUCTIONS, "batchmean")),
    *(likelihood("poisson_nll_loss", r, counts, reduction=r) for r in REDUCTIONS),
    likelihood("poisson_nll_loss", "full", counts, counts, full=True),
    *(
        likelihood("poisson_nll_loss", f"rate {full}", counts, uniform, log_input=False, full=full, eps=0.1)
        for full in (False, True)
    ),
    *(gaussian(r, reduction=r) for r in REDUCTIONS),
    gaussian("full", full=True),
    gaussian("homoscedastic", lambda: uniform(3, seed=2)),
    *(pair("binary_cross_entropy_with_logits", f" {r}", reduction=r, special=False) for r in REDUCTIONS),
    bce("none", some(4), some(4)),
    bce("mean", some(3, 1), some(3, 4)),
    bce("sum", nothing, some()),
    bce("mean", some(3, 4), nothing),
]
hard, soft = partial(classes, 5, high=3), partial(probabilities, 5, 3, seed=1)
LOSSES += [
    *(cross_entropy(f"classes {r}", hard, reduction=r, special=True) for r in REDUCTIONS),
    *(cross_entropy(f"probabilities {r}", soft, reduction=r, special=True) for r in REDUCTIONS),
    *(
        cross_entropy(f"classes weight smoothing {r}", hard, some(3), reduction=r, label_smoothing=0.2)
        for r in REDUCTIONS
    ),
    *(
        cross_entropy(f"probabilities weight smoothing {r}", soft, some(3), reduction=r, label_smoothing=0.2)
        for r in REDUCTIONS
    ),
    *(cross_entropy(f"classes ignore weight {r}", hard, some(3), reduction=r, ignore_index=1) for r in REDUCTIONS),
    cross_entropy("classes ignore smoothing", hard, ignore_index=1, label_smoothing=0.3),
    cross_entropy("classes smoothing 1", hard, some(3), label_smoothing=1.0),
    cross_entropy("probabilities smoothing 1", soft, label_smoothing=1.0),
    cross_entropy("classes negative smoothing", hard, label_smoothing=-0.3),
    cross_entropy(
        "trailing",
        partial(classes, 2, 3, 2, high=4),
        some(4),
        (2, 4, 3, 2),
        edges=(
            lambda: (normal(2, 4, 3), classes(2, 3, high=4), some(4)()),
            lambda: (normal(2, 4, 1, 2, 3), classes(2, 1, 2, 3, high=4), None),
            lambda: (normal(2, 4, 0), classes(2, 0, high=4), None),
            lambda: (normal(0, 4), classes(0, high=4), some(4)()),
            lambda: (normal(1, 1), classes(1, high=1), None),
        ),
        ignore_index=2,
        label_smoothing=0.1,
    ),
    *(
        cross_entropy(
            f"trailing none {kind}",
            target,
            nothing,
            (2, 4, 3),
            edges=edges,
            reduction="none",
        )
        for kind, target, edges in (
            ("classes", partial(classes, 2, 3, high=4), ()),
            (
                "probabilities",
                partial(probabilities, 2, 4, 3, seed=1),
                (lambda: (normal(0, 4), probabilities(0, 4), None),),
            ),
        )
    ),
    *(
        cross_entropy(
            f"unbatched classes {r}",
            partial(classes, high=4),
            some(4),
            (4,),
            edges=(lambda: (normal(4), classes(high=4).to(torch.uint8), None),),
            reduction=r,
        )
        for r in REDUCTIONS
    ),
    *(
        cross_entropy(f"unbatched probabilities {r}", partial(probabilities, 4, seed=1), shape=(4,), reduction=r)
        for r in REDUCTIONS
    ),
]


def linear_cross_entropy(
    variant: str,
    target: Callable[..., Tensor] = hard,
    bias: Callable[[], Tensor | None] = nothing,
    weight: Callable[[], Tensor | None] = nothing,
    edges: tuple[Callable[[], Inputs], ...] = (),
    **options: object,
) -> Row:
    def call(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b, t, c: f(x, w, t, linear_bias=b, weight=c, **options)

    return Row(
        f"linear_cross_entropy {variant}",
        call(ours.linear_cross_entropy),
        call(stock.linear_cross_entropy),
        inputs=lambda: (normal(5, 4), normal(3, 4, seed=2), bias(), target(), weight()),
        grads=(0, 1) if bias() is None else (0, 1, 2),
        edges=edges,
    )


LOSSES += [
    linear_cross_entropy("classes"),
    linear_cross_entropy("bias weight smoothing", hard, some(3), some(3), label_smoothing=0.2),
    linear_cross_entropy("ignore none", hard, some(3), ignore_index=1, reduction="none"),
    linear_cross_entropy("probabilities", soft, some(3)),
    linear_cross_entropy(
        "edges",
        edges=(
            lambda: (normal(4), normal(3, 4, seed=2), None, classes(high=3), None),
            lambda: (normal(5, 4), normal(3, 2, 4, seed=2), normal(3, 2), classes(5, 2, high=3), None),
            lambda: (normal(0, 4), normal(3, 4, seed=2), None, classes(0, high=3), None),
        ),
        reduction="sum",
    ),
]
ROWS = [*ACTIVATIONS, *LAYERS, *LOSSES]


def table(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize a test(row, check) by the rows of the function and the checks that apply to them."""
    rows = [row for row in ROWS if row.name.split()[0] == name]
    assert rows, name
    cases = [
        pytest.param(row, check, id=f"{row.name}-{check.__name__}")
        for row in rows
        for check in checks.ALL
        if checks.applies(row, check)
    ]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        test = pytest.mark.parametrize(("row", "check"), cases)(test)
        test = pytest.mark.usefixtures("one_thread")(test)
        return pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")(
            test
        )  # losses/test_residual.py has it

    return decorate
