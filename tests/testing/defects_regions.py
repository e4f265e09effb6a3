"""Mistakes that live in a region: of the inputs, of their scale, of grad_output's size, of special rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.testing.defects import Defect, Grads, classic, function, unary
from tests.testing.right import normal, positive

x, y = normal(3, 4), normal(3, 4, seed=1)
tiny = torch.tensor([1e-5, 2e-5, 3e-6, 4e-5])
UPSTREAM = "backward is not linear in grad_output: wrong for "


def sine(change: Grads) -> Grads:
    """sin, with its slope changed by change(slope, x)."""
    return unary(lambda x: change(x.cos(), x))


def upstream(change: Grads) -> Grads:
    """sin, with its grad_output changed."""
    return function(torch.sin, lambda g, x: change(g) * x.cos())


def rows(forward: Grads, backward: Grads) -> Grads:
    """A function of rows; backward gets (grad_output, x, forward(x))."""

    def run(ctx: Any, a: Tensor) -> Tensor:
        out = forward(a)
        ctx.save_for_backward(a, out)
        return out

    return classic(run, lambda ctx, g: backward(g, *ctx.saved_tensors))


def first(a: Tensor, count: int) -> Tensor:
    """1 for so many elements, 0 for the others."""
    return (torch.arange(a.numel()) < count).view(a.shape).to(a.dtype)


def softmax_backward(g: Tensor, a: Tensor, p: Tensor) -> Tensor:
    return p * (g - (g * p).sum(1, keepdim=True))


def overflowing(a: Tensor) -> Tensor:
    return a - a.to(torch.int32).to(a.dtype) * 0  # what follows a cast to int32 and back


def by_table(g: Tensor, a: Tensor) -> Tensor:
    index = (a.abs() * 16).to(torch.int32).to(a.dtype)  # ends at 2^31
    return g * torch.where(index / 16 > a.abs() - 1, 2 * a, 0)


class Zeroed(torch.autograd.Function):
    """A third derivative that is lost: the second is computed under no_grad."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a**4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ZeroedSlope.apply(g, *ctx.saved_tensors)


class ZeroedSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(g, a)
        return g * 4 * a**3

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        g, a = ctx.saved_tensors
        return h * 4 * a**3, h * g * 12 * (a * a).detach()


def nan_guard(g: Tensor, a: Tensor) -> Tensor:
    grad = 2 * g * a
    return grad if grad.isfinite().all() else torch.full_like(grad, torch.nan)


def batch_scale(g: Tensor, a: Tensor) -> Tensor:
    return 2 * g * a * (1 + 0 * a.max())  # NaN in one row is in all


def unit(a: Tensor) -> Tensor:
    return a / a.norm(dim=1, keepdim=True).clamp(min=1e-12)


NARROW = [
    Defect("sqrt at 1e-5 times -6", unary(lambda x: -3 / x.sqrt(), torch.sqrt), (tiny,), "gradient", "constant ratio -6"),
    Defect(
        "tanh(1e4 x) times 3",
        unary(lambda x: 3e4 * (1 - (1e4 * x).tanh() ** 2), lambda x: (1e4 * x).tanh()),
        (tiny,),
        "gradient",
        "constant ratio 3",
    ),
    Defect(
        "a band", sine(lambda s, x: torch.where((x > 1.3) & (x < 1.4), 2 * s, s)), (x,), "gradient elsewhere",
        "only where 1.3 < input < 1.4: constant ratio 2",
    ),
    Defect(
        "a band far away", sine(lambda s, x: torch.where((x > 300) & (x < 400), 0, s)), (x,), "gradient elsewhere",
        "only where 300 < input < 400: silently zero",
    ),
    Defect(
        "tiny inputs", unary(lambda x: torch.where(x.abs() < 1e-4, 0, x.cosh()), torch.sinh), (x,), "gradient elsewhere",
        "only where |input| < 0.0001: silently zero",
    ),
    Defect(
        "beyond fp16", unary(lambda x: torch.where((x * x).half().isfinite(), 1 / (x * x), 0), lambda x: -1 / x),
        (x,), "gradient elsewhere", "only where |input| > 260: silently zero",
    ),
    Defect("beyond int32", function(torch.square, by_table), (x,), "gradient elsewhere", "only where |input| > 1.3"),
    Defect(
        "a band of the first of two",
        function(torch.mul, lambda g, a, b: (g * b * torch.where((a > 2) & (a < 2.2), 1.5, 1.0), g * a)),
        (x, y),
        "gradient elsewhere",
        "only where 2 < input < 2.2: constant ratio 1.5",
    ),
    Defect(
        "a band within rows",
        rows(lambda a: a.tanh().sum(1), lambda g, a, out: g[:, None] * (1 - a.tanh() ** 2) * torch.where(a > 2.5, 3.0, 1.0)),
        (x,),
        "gradient elsewhere",
        "",
    ),
    Defect(
        "large logits only",
        rows(lambda a: a.softmax(1), lambda g, a, p: softmax_backward(g, a, p) * torch.where(a.abs().amax() > 20, 0.5, 1.0)),
        (x,),
        "gradient elsewhere",
        "",
    ),
]  # fmt: skip

UPSTREAMS = [
    Defect("clamped at 5", upstream(lambda g: g.clamp(-5, 5)), (x,), "upstream sizes", f"{UPSTREAM}|grad_output| > "),
    Defect(
        "flushed below 1e-3", upstream(lambda g: torch.where(g.abs() < 1e-3, 0, g)), (x,), "upstream sizes",
        f"{UPSTREAM}|grad_output| < ",
    ),
    Defect("in fp16", upstream(lambda g: (g * 2**-20).float().half().to(g.dtype) * 2**20), (x,), "gradient", ""),
    Defect("beyond fp16", upstream(lambda g: torch.where(g.abs() > 65504, torch.inf, g)), (x,), "upstream sizes", UPSTREAM),
    Defect("nan_to_num of large ones", upstream(lambda g: g.clamp(-1e10, 1e10)), (x,), "upstream sizes", UPSTREAM),
    Defect("no negative ones", upstream(lambda g: torch.where((g < 0).all(), 0, g)), (x.abs()[:1, :1],), "upstream sizes",
           ""),
    Defect("ones are taken for a mean", upstream(lambda g: g / g.numel() if (g == 1).all() else g), (x,), "upstream sizes",
           f"{UPSTREAM}one that is 1 throughout"),
    Defect("flushed below 1e-25", upstream(lambda g: torch.where(g.abs() < 1e-25, 0, g)), (x,), "upstream sizes", UPSTREAM),
    Defect("zeros end it", upstream(lambda g: g * 0 if (g == 0).any() else g), (x,), "upstream sizes", UPSTREAM),
    Defect(
        "small ones beside large ones", upstream(lambda g: torch.where(g.abs() < 1e-4 * g.abs().max(), 0, g)), (x,),
        "upstream sizes", f"{UPSTREAM}one of mixed sizes",
    ),
    Defect("normalised above a norm", upstream(lambda g: g / (g.norm() / 1e3).clamp(min=1)), (x,), "upstream sizes", UPSTREAM),
    Defect("nan_to_num of NaN", upstream(lambda g: g.nan_to_num(0, torch.inf, -torch.inf)), (x,), "upstream sizes",
           "nan in grad_output is taken for a number"),
]  # fmt: skip

REFERENCE = [
    Defect("normalised without eps", lambda a: a / a.norm(dim=1, keepdim=True), (x,), "reference elsewhere",
           "where input 0 (a) is zero: not finite", options=dict(reference=F.normalize)),
    Defect("a table that ends", lambda a: a.clamp(-3, 3).exp(), (x / 4,), "reference elsewhere", "not the reference",
           options=dict(reference=torch.exp)),
]  # fmt: skip


SPECIAL = [
    Defect("clamps its input when it is large", lambda a: (a.data.clamp_(-50, 50), a.sin())[1], (x,), "mutation",
           "input mutated"),
    Defect("x^1.5 by a quotient", function(lambda a: a.abs() ** 1.5, lambda g, a: g * 1.5 * a.abs() ** 1.5 / a), (x,),
           "zeros", "wrong where input 0 is zero: not finite"),
    Defect("a block of 1,024", function(torch.sin, lambda g, a: g * a.cos() * first(a, 1024)), (x,), "gradient elsewhere",
           "elements from number 1024 on are wrong"),
    Defect("third derivative zero", Zeroed.apply, (x,), "third derivative", "third derivative"),
    Defect("one row", function(torch.square, lambda g, a: 2 * g * a * (1.5 if a.shape[0] == 1 else 1)), (x,),
           "numbers of rows", "wrong for 1 row: constant ratio 1.5"),
    Defect("many rows", function(torch.square, lambda g, a: 2 * g * a * (a.shape[0] < 65)), (x,),
           "numbers of rows", "wrong for 67 rows: silently zero"),
    Defect("NaN spreads by a guard", function(torch.square, nan_guard), (x,), "rows of NaN", "NaN in one row of the input"),
    Defect("NaN spreads by a maximum", function(torch.square, batch_scale), (x,), "rows of NaN", "NaN in one row of the input"),
    Defect(
        "NaN of grad_output spreads", upstream(lambda g: g * (1 + 0 * g.sum())), (x,), "rows of NaN",
        "NaN in one row of grad_output",
    ),
    Defect(
        "zero vector",
        rows(unit, lambda g, a, u: (g - u * (g * u).sum(1, keepdim=True)) / a.norm(dim=1, keepdim=True)),
        (x,),
        "gradient",
        "",
        "ok",
    ),
    Defect(
        "norm at 0", rows(lambda a: a.norm(dim=1), lambda g, a, n: g[:, None] * a / n[:, None]), (x,), "zeros", "not finite"
    ),
    Defect(
        "no rows", function(lambda a: a.square(), lambda g, a: 2 * g * a / g.abs().max() * g.abs().max()), (x,), "no rows",
        "backward fails for a batch of no rows",
    ),
    Defect(
        "log1p at 0",
        unary(lambda x: torch.where(x == 0, 0, 1 / (1 + x)), torch.log1p),
        (positive(3, 4),),
        "zeros",
        "wrong where input 0 is zero",
    ),
]  # fmt: skip

DEFECTS_IN_REGIONS = [d for d in (*NARROW, *UPSTREAMS, *REFERENCE, *SPECIAL) if d.verdict != "ok"]
