"""Functions with one planted mistake each, and what the report must say of it: the check, and the cause in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tests.testing.right import classes, normal, unit

Grads = Callable[..., Any]


@dataclass(frozen=True)
class Defect:
    name: str
    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    check: str
    cause: str  # a part of the cause that the report names
    verdict: str = "error"
    loss: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def function(forward: Grads, backward: Grads, jvp: Grads | None = None, vmap: Grads | None = None) -> Grads:
    """An autograd.Function that saves its tensors; backward and jvp get (grads or tangents, *inputs)."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    def back(ctx: Any, g: Tensor) -> Any:
        return backward(g, *ctx.saved_tensors)

    methods: dict[str, Any] = {
        "forward": lambda *inputs: forward(*inputs),
        "setup_context": setup_context,
        "backward": back,
    }
    if jvp is not None:
        methods["jvp"] = lambda ctx, *t: jvp(t, *ctx.saved_tensors)
    if vmap is not None:
        methods["vmap"] = vmap
    body = {name: staticmethod(method) for name, method in methods.items()}
    return type("Defective", (torch.autograd.Function,), {**body, "generate_vmap_rule": vmap is None}).apply


def classic(forward: Grads, backward: Grads) -> Grads:
    """An autograd.Function of the form forward(ctx, ...)."""
    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Defective", (torch.autograd.Function,), body).apply


def saving(value: Grads) -> Grads:
    """forward(ctx, *inputs) that saves the inputs and returns the value."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        ctx.save_for_backward(*inputs)
        return value(*inputs)

    return forward


def unary(derivative: Grads, value: Grads = torch.sin) -> Grads:
    return function(lambda x: value(x), lambda g, x: g * derivative(x))


def second(x: Tensor) -> Tensor:
    return x * x


x, y, square = normal(3, 4), normal(3, 4, seed=1), normal(4, 4, seed=2)
wide = normal(3, 4) * 2
x1 = torch.tensor([[-2.5, -0.5, 0.25, 1.5], [0.5, 2.5, -1.25, -0.75]])


# Wrong numbers.


def transposed_square(g: Tensor, a: Tensor) -> Tensor:
    return (2 * g * a).mT


def swapped(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return g * a, g * b  # right: g * b, g * a


def one_row_wrong(g: Tensor, a: Tensor) -> Tensor:
    grad = 2 * g * a
    return torch.cat([grad[:1] * 1.5 + 0.1 * a[:1], grad[1:]])


def row_scaled(g: Tensor, a: Tensor) -> Tensor:
    return 2 * g * a * torch.arange(1, 4, dtype=a.dtype)[:, None]


def centered(g: Tensor, a: Tensor) -> Tensor:
    return g  # right: g - g.mean(1, keepdim=True)


def both(ctx: Any, a: Tensor) -> Any:
    ctx.save_for_backward(a)
    ctx.set_materialize_grads(False)
    return a.sin(), a.exp()


def of_both(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
    (a,) = ctx.saved_tensors
    return g * a.cos() + h * a.exp()


def softmax_slope(g: Tensor, a: Tensor) -> Tensor:
    p = a.softmax(-1)
    return p * (g - (g * p).sum(-1, keepdim=True))


only_both = classic(both, of_both)
vmap_at_0 = function(lambda a: a.softmax(-1), softmax_slope, vmap=lambda info, dims, a: (vmap_at_0(a), 0))
jvp_raises = function(torch.sin, lambda g, a: g * a.cos(), jvp=lambda t, a: t[0] @ a)

NUMBERS = [
    Defect("ratio 0.5", unary(lambda x: x, torch.square), (x,), "gradient", "constant ratio 0.5"),
    Defect("0.05 % off", unary(lambda x: 1.0005 * x.cos()), (x,), "gradient", "constant ratio 1.0005"),
    Defect("sign", unary(lambda x: x.sin(), torch.cos), (x,), "gradient", "sign"),
    Defect("no derivative", unary(lambda x: x * 0), (x,), "gradient", "silently zero"),
    Defect("offset", function(torch.sin, lambda g, x: g * x.cos() + 0.01), (x,), "gradient", "constant offset 0.01"),
    Defect(
        "negative side",
        unary(lambda x: torch.where(x < 0, 0.2, 1.0), lambda x: F.leaky_relu(x, 0.1)),
        (x,),
        "gradient",
        "only where the input is negative: constant ratio 2",
    ),
    Defect(
        "beyond the threshold",
        unary(lambda x: torch.where(x.abs() > 1, 2 * x.sign(), x), lambda x: F.huber_loss(x, 0 * x, "none")),
        (x1,),
        "gradient",
        "only where |input| > 1: constant ratio 2",
    ),
    Defect(
        "far away only",
        unary(lambda x: torch.where(x > 6, 0.0, x.cos())),
        (x,),
        "gradient elsewhere",
        "only where input > 6",
    ),
    Defect(
        "relu at 0",
        unary(lambda x: torch.where(x == 0, 2.0, (x > 0) * 1.0), torch.relu),
        (x,),
        "kinks",
        "wrong at input 0",
    ),
    Defect("abs at 0 is NaN", unary(lambda x: x / x.abs(), torch.abs), (x,), "kinks", "wrong at input 0: not finite"),
    Defect(
        "ties count twice",
        function(lambda x: x.amax(1), lambda g, x: g[:, None] * (x == x.amax(1, keepdim=True))),
        (x,),
        "kinks",
        "wrong where inputs tie",
    ),
    Defect("square transposed", function(second, transposed_square), (square,), "gradient", "transposed"),
    Defect("swapped", function(torch.mul, swapped), (x, y), "gradient", "gradient of input 1 returned for input 0"),
    Defect(
        "flipped", function(second, lambda g, x: (2 * g * x).flip(1)), (x,), "gradient", "reversed along dimension 1"
    ),
    Defect(
        "rolled",
        function(second, lambda g, x: (2 * g * x).roll(1, 0)),
        (x,),
        "gradient",
        "right numbers in wrong places",
    ),
    Defect("row 0", function(second, one_row_wrong), (x,), "gradient", "only index 0 of dimension 0"),
    Defect("rows scaled", function(second, row_scaled), (x,), "gradient", "constant ratio along dimension 1"),
    Defect(
        "missing mean",
        function(lambda x: x - x.mean(1, keepdim=True), centered),
        (x,),
        "gradient",
        "constant offset along dimension 1",
    ),
    Defect(
        "mean without 1/N",
        function(lambda x: x.mean(), lambda g, x: g.expand_as(x)),
        (x,),
        "gradient",
        "= the number of elements",
    ),
    Defect(
        "1/N twice",
        function(lambda x: x.square().mean(), lambda g, x: 2 * g * x / 144),
        (x,),
        "gradient",
        "= 1 / the number of elements",
    ),
    Defect("grad_output ignored", function(torch.sin, lambda g, x: x.cos()), (x,), "gradient", "grad_output ignored"),
    Defect(
        "grad_output averaged",
        function(torch.sin, lambda g, x: g.mean() * x.cos()),
        (x,),
        "gradient",
        "grad_output averaged",
    ),
    Defect(
        "grad_output squared",
        function(torch.sin, lambda g, x: g * g.abs() * x.cos()),
        (x,),
        "linear backward",
        "not linear",
    ),
    Defect(
        "clipped gradient",
        function(torch.sin, lambda g, x: (g * x.cos()).clamp(-0.5, 0.5)),
        (x,),
        "linear backward",
        "not linear",
    ),
    Defect(
        "constants in float32",
        unary(lambda x: x.float().cos().to(x.dtype)),
        (x,),
        "gradient",
        "right to",
        "note",
    ),
    Defect(
        "straight-through",
        lambda x: x + (x.round() - x).detach(),
        (x,),
        "gradient",
        "not zero, where the function is flat",
    ),
    Defect(
        "bias by mean",
        function(lambda x, b: x + b, lambda g, x, b: (g, g.mean(0))),
        (x, normal(4)),
        "gradient",
        "constant ratio 0.333333",
    ),
]


# Missing or silently zero derivatives.


def detached_save() -> Grads:
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach().clone()
        return x**3

    return classic(forward, lambda ctx, g: g * 3 * ctx.x**2)


def backward_no_grad(ctx: Any, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    with torch.no_grad():
        return g * 3 * x**2


def backward_once(ctx: Any, g: Tensor) -> Tensor:
    return g * 3 * ctx.saved_tensors[0] ** 2


def slope_detached(ctx: Any, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return g.detach() * 3 * x**2  # so that the derivative by grad_output is lost


@torch.library.custom_op("torchcalc_test::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def cubed(x: Tensor) -> Tensor:
    return x**3


def slope_of_cube(g: Tensor, x: Tensor) -> Tensor:
    return g * 3 * x**2


MISSING = [
    Defect(
        "None for b",
        function(torch.mul, lambda g, a, b: (g * b, None)),
        (x, y),
        "differentiable",
        "None returned for input 1",
    ),
    Defect("detached input", lambda a, b: a * b.detach(), (x, y), "differentiable", "None returned for input 1 (b)"),
    Defect(
        "detached save",
        detached_save(),
        (x,),
        "second derivative",
        "first derivative right, second derivative silently zero",
    ),
    Defect(
        "backward under no_grad",
        classic(saving(cubed), backward_no_grad),
        (x,),
        "second derivative",
        "first derivative right, second derivative silently zero",
    ),
    Defect("needs every output used", only_both, (x,), "outputs apart", "raises when only output 0 is used"),
    Defect("own vmap loses a dimension", vmap_at_0, (x,), "vmap", "vmap differs from a loop"),
    Defect("own jvp raises", jvp_raises, (x,), "forward mode", "its jvp raises"),
    Defect(
        "once_differentiable",
        classic(saving(cubed), once_differentiable(backward_once)),
        (x,),
        "hessian",
        "second derivative silently zero",
        "note",  # declared
    ),
    Defect(
        "grad_output detached",
        classic(saving(cubed), slope_detached),
        (x,),
        "derivative by grad_output",
        "silently zero",
    ),
    Defect(
        "second derivative off",
        function(
            cubed,
            lambda g, x: g * function(lambda x: 3 * x**2, lambda g, x: g * 3 * x)(x),
        ),
        (x,),
        "second derivative",
        "constant ratio 0.5",
    ),
    Defect(
        "jvp zero",
        function(cubed, slope_of_cube, lambda t, x: 0 * t[0]),
        (x,),
        "forward mode",
        "forward derivative silently zero",
    ),
    Defect(
        "jvp ratio",
        function(cubed, slope_of_cube, lambda t, x: t[0] * x**2),
        (x,),
        "forward mode",
        "constant ratio 0.333333",
    ),
    Defect("jvp sign", function(cubed, slope_of_cube, lambda t, x: -3 * t[0] * x**2), (x,), "forward mode", "sign"),
    Defect("custom_op forward mode", cube, (x,), "forward mode", "forward derivative silently zero", verdict="note"),
]


# Broken contracts.


def frozen_slip(ctx: Any, g: Tensor) -> Any:
    a, b = ctx.saved_tensors
    return g * b if ctx.needs_input_grad[1] else g, g * a  # the shortcut forgets b


def frozen_crash(ctx: Any, g: Tensor) -> Any:
    a, b = ctx.saved_tensors
    grad_a = g * b if ctx.needs_input_grad[0] else None
    return grad_a, grad_a / b * a


def write_grad_output(ctx: Any, g: Tensor) -> Tensor:
    return g.mul_(ctx.saved_tensors[0].cos())


def write_saved(ctx: Any, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return x.data.cos_().mul(g)


def write_input(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x.clone())
    return x.data.mul_(2.0) / 2


def reused_buffer() -> Grads:
    buffer: dict[Any, Tensor] = {}

    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = buffer.setdefault((x.dtype, x.shape), torch.empty_like(x))
        return torch.sin(x, out=out).detach()

    return classic(forward, lambda ctx, g: g * ctx.saved_tensors[0].cos())


def shared_state() -> Grads:
    state: list[Tensor] = [torch.empty(0)]

    def forward(ctx: Any, x: Tensor) -> Tensor:
        state[0] = x.detach().clone()
        return x.sin()

    return classic(forward, lambda ctx, g: g * state[0].cos())


def raw_data(ctx: Any, x: Tensor) -> Tensor:
    ctx.x = x.data  # shares memory, outside of autograd's sight
    return x.sin()


def on_ctx(ctx: Any, x: Tensor) -> Tensor:
    ctx.x = x
    return x.sin()


def leaking(ctx: Any, x: Tensor) -> Tensor:
    ctx.y = x.exp()
    return ctx.y


def alias(x: Tensor) -> Tensor:
    return function(lambda x: torch.as_tensor(x.detach().numpy()), lambda g, x: g)(x)


def assumes_contiguous(x: Tensor) -> Tensor:
    strides = torch.empty(x.shape).stride()
    return torch.as_strided(x, x.shape, strides, x.storage_offset())


def grad_assumes_contiguous(ctx: Any, g: Tensor) -> Tensor:
    return assumes_contiguous(g) * ctx.saved_tensors[0].cos()


def noisy(g: Tensor, x: Tensor) -> Tensor:
    return g * x.cos() * (1 + 1e-3 * torch.rand(()))


def wrong_vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
    return x.cumsum(0), in_dims[0]  # along the batch, if that is dimension 0


def keep_shape(g: Tensor, like: Tensor) -> Tensor:
    while g.dim() > like.dim():
        g = g.sum(0)
    return g[tuple(slice(0, n) for n in like.shape)]  # right: sum where like has size 1


def broadcasting(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return keep_shape(g * b, a), keep_shape(g * a, b)


def linear_backward(ctx: Any, g: Tensor) -> Any:
    a, w = ctx.saved_tensors
    return g @ w, g.mT @ a


CONTRACT = [
    Defect("wrong when b is frozen", classic(saving(torch.mul), frozen_slip), (x, y), "subsets", "wrong when input 1"),
    Defect(
        "raises when a is frozen", classic(saving(torch.mul), frozen_crash), (x, y), "subsets", "raises when input 0"
    ),
    Defect("requires grad under no_grad", lambda x: x.sin().requires_grad_(), (x,), "no_grad", "ignores no_grad"),
    Defect(
        "writes to grad_output", classic(saving(torch.sin), write_grad_output), (x,), "mutation", "grad_output mutated"
    ),
    Defect("writes to what it saved", classic(saving(torch.sin), write_saved), (x,), "mutation", "input mutated"),
    Defect("writes to its input", classic(write_input, lambda ctx, g: g), (x,), "mutation", "input mutated"),
    Defect("output is a buffer", reused_buffer(), (x,), "aliasing", "output overwritten by the next call"),
    Defect("output aliases input", alias, (x,), "aliasing", "output aliases"),
    Defect("state in a global", shared_state(), (x,), "backward twice", "state shared between calls"),
    Defect("saves x.data", classic(raw_data, lambda ctx, g: g * ctx.x.cos()), (x,), "saved tensors", "unnoticed"),
    Defect("keeps x on ctx", classic(on_ctx, lambda ctx, g: g * ctx.x.cos()), (x,), "saved tensors", "unnoticed"),
    Defect(
        "keeps a copy on ctx",
        detached_save(),
        (x,),
        "saved tensors",
        "tensor kept on ctx",
        "note",
    ),
    Defect("leak", classic(leaking, lambda ctx, g: g * ctx.y), (x,), "leaks", "leak"),
    Defect(
        "assumes x contiguous",
        classic(saving(lambda x: assumes_contiguous(x).sin()), lambda ctx, g: g * ctx.saved_tensors[0].cos()),
        (x,),
        "layouts",
        "breaks when input 0 is",
    ),
    Defect(
        "view(-1)",
        lambda x: x.view(-1).sin().view(x.shape),
        (x,),
        "layouts",
        "breaks when x is transposed",
        "note",
    ),
    Defect(
        "assumes grad_output contiguous",
        classic(saving(torch.sin), grad_assumes_contiguous),
        (x,),
        "layouts",
        "breaks when grad_output is",
    ),
    Defect("random backward", function(torch.sin, noisy), (x,), "determinism", "not deterministic"),
    Defect(
        "refuses 0-d",
        lambda x: x.index_select(0, torch.arange(len(x))).sin(),
        (x,),
        "shapes",
        "refuses 0-d inputs",
        "note",
    ),
    Defect(
        "vmap ignores the batch",
        function(lambda x: x.cumsum(0), lambda g, x: g.flip(0).cumsum(0).flip(0), vmap=wrong_vmap),
        (square,),
        "vmap",
        "vmap differs from a loop",
    ),
    Defect(
        "missing broadcast sum",
        function(torch.mul, broadcasting),
        (x, y),
        "broadcast",
        "missing sum over a broadcast dimension",
    ),
    Defect(
        "left to the engine",
        classic(saving(lambda a, b: a + b), lambda ctx, g: (g, g)),
        (x, normal(4)),
        "raw gradients",
        "missing sum over a broadcast dimension",
        "note",
    ),
    Defect(
        "float32 gradient",
        classic(saving(torch.sin), lambda ctx, g: (g * ctx.saved_tensors[0].cos()).float()),
        (x,),
        "raw gradients",
        "wrong gradient dtype",
        "note",
    ),
    Defect(
        "linear under autocast", classic(saving(F.linear), linear_backward), (x, y), "autocast", "raises under autocast"
    ),
]


# Numbers that run out.

NUMERIC = [
    Defect(
        "naive logsumexp",
        lambda x: x.exp().sum(1).log(),
        (x,),
        "extremes",
        "unstable at large input: value",
    ),
    Defect(
        "naive softplus slope",
        function(F.softplus, lambda g, x: g * x.exp() / (1 + x.exp())),
        (x,),
        "extremes",
        "unstable at large input: gradient nan",
    ),
    Defect(
        "variance by moments",
        lambda x: x.square().mean(1) - x.mean(1).square(),
        (x + 100,),
        "precision",
        "loses digits",
        options=dict(reference=lambda x: x.var(1, correction=0)),
    ),
    Defect(
        "NaN hidden",
        function(torch.relu, lambda g, x: g * (x > 0), lambda t, x: t[0] * (x > 0)),
        (x,),
        "special values",
        "wrong at input nan",
        options=dict(reference=lambda x: torch.where(x > 1e9, torch.nan, torch.relu(x))),
    ),
    Defect(
        "NaN lost",
        lambda x: torch.where(x > 0, x, 0.1 * x.nan_to_num()),
        (x,),
        "special values",
        "NaN swallowed",
        "note",
    ),
    Defect(
        "another function",
        lambda x: 1.5 * torch.sigmoid(x),
        (x,),
        "reference",
        "constant ratio 1.5",
        options=dict(reference=torch.sigmoid),
    ),
]


# Losses.


def reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def rows(a: Tensor, target: Tensor) -> Tensor:
    return -a.log_softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]


class IgnoredRows(torch.autograd.Function):
    """Cross-entropy whose backward forgets that ignored rows are zero; each row by itself."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, target: Tensor, ignore: int) -> Tensor:
        ctx.save_for_backward(a, target)
        return torch.where(target == ignore, 0, rows(a, target))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, target = ctx.saved_tensors
        return g[:, None] * (a.softmax(1) - F.one_hot(target.clamp(min=0), a.shape[1])), None, None


def ignoring(a: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    loss = IgnoredRows.apply(a, target, ignore_index)
    return loss.sum() / (target != ignore_index).sum() if reduction == "mean" else reduce(loss, reduction)


def counts_ignored(a: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    return reduce(F.cross_entropy(a, target, ignore_index=ignore_index, reduction="none"), reduction)


def off_by_one(a: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
    loss = (a - b).square()
    return loss.sum() / (a.numel() - 1) if reduction == "mean" else reduce(loss, reduction)


def sum_is_mean(a: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
    return reduce((a - b).square(), "mean" if reduction == "sum" else reduction)


class MeanUpstream(torch.autograd.Function):
    """Takes the mean of the samples' gradients, which reduction="mean" and "sum" do not notice."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (a - b).square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b = ctx.saved_tensors
        grad = 2 * g.mean() * (a - b)
        return grad, -grad


def mean_upstream(a: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
    return reduce(MeanUpstream.apply(a, b), reduction)


def wrong_class_weight(a: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    loss = F.cross_entropy(a, target, reduction="none")
    if weight is None:
        return reduce(loss, reduction)
    w = weight.roll(1)[target]
    return (w * loss).sum() / w.sum() if reduction == "mean" else reduce(w * loss, reduction)


def mean_by_count(a: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    return reduce(F.cross_entropy(a, target, weight, reduction="none"), reduction)


def smoothing_squared(a: Tensor, target: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(a, target, label_smoothing=label_smoothing**2, reduction=reduction)


def coupled(a: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
    return reduce((a - a.mean(0) - b).square(), reduction)


class BatchScaled(torch.autograd.Function):
    """Divides by the batch in backward, whatever the reduction."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (a - b).square().sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b = ctx.saved_tensors
        grad = 2 * g * (a - b) / len(a)
        return grad, -grad


def batch_scaled(a: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
    if reduction == "none":
        return (a - b).square()
    total = BatchScaled.apply(a, b)
    return total if reduction == "sum" else total * len(a) / a.numel()


def naive_bce(a: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
    p = a.sigmoid()
    return reduce(-b * p.log() - (1 - b) * (1 - p).log(), reduction)


def naive_cross_entropy(a: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    return reduce(-a.softmax(1).log().gather(1, target[:, None])[:, 0], reduction)


def sum_over_batch(a: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    loss = F.cross_entropy(a, target, ignore_index=ignore_index, reduction="none") + 0.1 * a.square().sum(1)
    return loss.sum() / (target != ignore_index).sum().clamp(min=1) if reduction == "mean" else reduce(loss, reduction)


logits, target = normal(5, 3), classes(5, high=3)
ignored = torch.tensor([0, -100, 2, 1, -100])
LOSSES = [
    Defect(
        "gradient of ignored rows",
        ignoring,
        (logits, ignored),
        "gradient",
        "only rows equal to ignore_index",
        loss=True,
    ),
    Defect(
        "mean counts ignored targets",
        counts_ignored,
        (logits, target),
        "ignore_index",
        "ignored targets count",
        loss=True,
    ),
    Defect("mean over N - 1", off_by_one, (x, y), "reductions", "mean is divided by a wrong N", loss=True),
    Defect("sum is a mean", sum_is_mean, (x, y), "reductions", "sum is not the sum of none", loss=True),
    Defect("upstream averaged", mean_upstream, (x, y), "upstream gradients", "grad_output averaged", loss=True),
    Defect(
        "weight of another class",
        wrong_class_weight,
        (logits, target),
        "class weights",
        "weight of another class",
        loss=True,
    ),
    Defect(
        "mean not over the weights",
        mean_by_count,
        (logits, target),
        "class weights",
        "mean is not over the weights",
        "note",
        loss=True,
    ),
    Defect(
        "smoothing squared",
        smoothing_squared,
        (logits, target),
        "label smoothing",
        "not affine in the smoothing",
        loss=True,
    ),
    Defect(
        "samples coupled",
        coupled,
        (x, y),
        "micro-batches",
        "samples of a batch depend on each other",
        "note",
        loss=True,
    ),
    Defect("1/batch under sum", batch_scaled, (x, y), "sum gradient", "constant ratio 0.333333", loss=True),
    Defect("naive BCE", naive_bce, (x, unit(3, 4)), "large logits", "unstable at large logits", loss=True),
    Defect(
        "naive cross-entropy",
        naive_cross_entropy,
        (logits, target),
        "large logits",
        "unstable at large logits",
        loss=True,
    ),
    Defect(
        "NaN for no targets",
        partial(F.cross_entropy, ignore_index=-1),
        (logits, target),
        "all ignored",
        "all ignored gives NaN",
        "note",
        loss=True,
    ),
    Defect(
        "ignored rows are regularised",
        sum_over_batch,
        (logits, target),
        "all ignored",
        "ignored targets count",
        loss=True,
    ),
]
DEFECTS = [*NUMBERS, *MISSING, *CONTRACT, *NUMERIC, *LOSSES]
