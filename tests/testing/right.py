"""Right functions and losses, of stock torch and of torchcalc: none may have an error."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchcalc.functional
import torchcalc.nn
from tests import stock


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def positive(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).abs() + 0.3


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1


def signs(*shape: int, seed: int = 0) -> Tensor:
    return torch.where(normal(*shape, seed=seed) > 0, 1.0, -1.0)


def classes(*shape: int, high: int) -> Tensor:
    return (torch.arange(int(torch.tensor(shape).prod())) % high).reshape(shape)


@dataclass(frozen=True)
class Right:
    """A right function, as the arguments of check_function (or check_loss)."""

    name: str
    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    loss: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def f(name: str, fn: Callable[..., Any], *inputs: Any, **options: Any) -> Right:
    return Right(name, fn, inputs, False, options)


def loss(name: str, fn: Callable[..., Any], *inputs: Any, **options: Any) -> Right:
    return Right(name, fn, inputs, True, options)


STRIDES = ("layouts", "vmap")  # in backward of batch_norm torch takes a strided weight as contiguous: test_functions.py


def bce_with_logits(x: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    """What F.binary_cross_entropy_with_logits is, but at infinities, where that is NaN: contradicted they cost infinity."""
    for_one, for_zero = F.softplus(-x), F.softplus(x)
    losses = torch.where(t > 0, t * for_one, 0) + torch.where(t < 1, (1 - t) * for_zero, 0)
    return {"none": lambda: losses, "sum": losses.sum, "mean": losses.mean}[reduction]()


x, y, image = normal(3, 4), normal(3, 4, seed=1), normal(2, 3, 5, 5)

ELEMENTWISE = [
    *(
        f(fn.__name__, fn, x)
        for fn in (
            torch.exp,
            torch.expm1,
            torch.sin,
            torch.cos,
            torch.tan,
            torch.sinh,
            torch.cosh,
            torch.tanh,
            torch.atan,
            torch.asinh,
            torch.erf,
            torch.erfc,
            torch.sigmoid,
            torch.square,
            torch.abs,
            torch.neg,
            torch.sinc,
            F.relu,
            F.relu6,
            F.gelu,
            F.silu,
            F.mish,
            F.softplus,
            F.softsign,
            F.elu,
            F.selu,
            F.celu,
            F.hardtanh,
            F.hardsigmoid,
            F.hardswish,
            F.logsigmoid,
            F.leaky_relu,
            F.tanhshrink,
            F.hardshrink,
            F.softshrink,
        )
    ),
    *(
        f(fn.__name__, fn, positive(3, 4))
        for fn in (torch.log, torch.log1p, torch.sqrt, torch.rsqrt, torch.reciprocal, torch.lgamma, torch.digamma)
    ),
    *(f(fn.__name__, fn, unit(3, 4)) for fn in (torch.asin, torch.acos, torch.atanh, torch.logit, torch.erfinv)),
    f("gelu tanh", partial(F.gelu, approximate="tanh"), x),
    f("threshold", partial(F.threshold, threshold=0.1, value=20.0), x),
    f("clamp", partial(torch.clamp, min=-0.5, max=0.5), x),
    f("nan_to_num", torch.nan_to_num, x),
    f("complex exp", torch.exp, torch.complex(x, y)),
]
FUNCTIONS = [
    *(
        f(fn.__name__, fn, x, y)
        for fn in (torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, torch.atan2, torch.logaddexp)
    ),
    f("div", torch.div, x, positive(3, 4)),
    f("pow", torch.pow, positive(3, 4), y),
    f("hypot", torch.hypot, x, y),
    f("where", lambda a, b: torch.where(a > b, a * b, b), x, y),
    f("softmax", partial(torch.softmax, dim=1), x),
    f("log_softmax", partial(torch.log_softmax, dim=0), x),
    f("logsumexp", partial(torch.logsumexp, dim=1), x),
    f("cumsum", partial(torch.cumsum, dim=1), x),
    f("cumprod", partial(torch.cumprod, dim=1), x),
    f("prod", torch.prod, x),
    f("var", partial(torch.var, dim=1), x),
    f("norm", partial(torch.linalg.vector_norm, dim=1), x),
    f("amax", partial(torch.amax, dim=1), x),
    f("sort", partial(torch.sort, dim=1), x),
    f("mean", partial(torch.mean, dim=0), x),
    f("transpose", lambda a: a.mT, x),
    f("matmul", torch.matmul, x, y.mT.contiguous()),
    f("bmm", torch.bmm, normal(2, 3, 4), normal(2, 4, 2, seed=1)),
    f("einsum", lambda a, b: torch.einsum("ij,kj->ik", a, b), x, y),
    f("inverse", torch.linalg.inv, normal(3, 3) + 3 * torch.eye(3)),
    f("linear", F.linear, x, normal(2, 4, seed=1), normal(2, seed=2)),
    f("bilinear", F.bilinear, x, normal(3, 2, seed=1), normal(2, 4, 2, seed=2)),
    f("layer_norm", lambda a, w, b: F.layer_norm(a, (4,), w, b), x, normal(4, seed=1), normal(4, seed=2)),
    f("rms_norm", lambda a, w: F.rms_norm(a, (4,), w), x, normal(4, seed=1)),
    f("group_norm", lambda a, w, b: F.group_norm(a, 2, w, b), normal(3, 4, 3), normal(4, seed=1), normal(4, seed=2)),
    f(
        "batch_norm",
        lambda a, w, b: F.batch_norm(a, None, None, w, b, training=True),
        x,
        normal(4, seed=1),
        normal(4, seed=2),
        exclude=STRIDES,
    ),
    f("conv1d", F.conv1d, normal(2, 3, 6), normal(2, 3, 3, seed=1), normal(2, seed=2)),
    f("conv2d", F.conv2d, image, normal(2, 3, 3, 3, seed=1), normal(2, seed=2)),
    f("avg_pool2d", partial(F.avg_pool2d, kernel_size=2), image),
    f("max_pool2d", partial(F.max_pool2d, kernel_size=2), image),
    f("interpolate", partial(F.interpolate, scale_factor=2.0, mode="bilinear"), normal(1, 2, 3, 3)),
    f("pad", partial(F.pad, pad=(1, 2)), x),
    f("normalize", F.normalize, x),
    f("cosine_similarity", F.cosine_similarity, x, y),
    f("attention", F.scaled_dot_product_attention, normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)),
    f("embedding", lambda w: F.embedding(classes(2, 3, high=4), w), normal(4, 3)),
    f("dropout", partial(F.dropout, p=0.4), x),
    f("dropout of a transposed activation", lambda a: F.dropout((a * a).t(), 0.4).t(), x),
    f("encoder layer in training", nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), normal(1, 2, 4)),
    f("glu", F.glu, x),
    f("nn.Linear", nn.Linear(4, 2), x),
    f("nn.GRUCell", nn.GRUCell(4, 3), x, normal(3, 3, seed=1)),
    f("nn.BatchNorm1d", nn.BatchNorm1d(4), x, exclude=STRIDES),
    f("nn.Sequential", nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), x),
    f("nn.PReLU", nn.PReLU(), x),
]
target = classes(5, high=3)
target3 = torch.tensor([0, 2, 1, 1, 2])
LOSSES = [
    loss("mse_loss", F.mse_loss, x, y),
    loss("l1_loss", F.l1_loss, x, y),
    loss("smooth_l1_loss", F.smooth_l1_loss, x, y),
    loss("huber_loss", partial(F.huber_loss, delta=0.7), x, y),
    loss("cross_entropy", F.cross_entropy, normal(5, 3), target),
    loss("cross_entropy ignore", partial(F.cross_entropy, ignore_index=1), normal(5, 3), target),
    loss("cross_entropy weight", nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 0.7])), normal(5, 3), target),
    loss("cross_entropy probabilities", F.cross_entropy, normal(5, 3), normal(5, 3, seed=1).softmax(1)),
    loss("cross_entropy 2d", F.cross_entropy, normal(2, 3, 2, 2), classes(2, 2, 2, high=3)),
    loss("nll_loss", lambda a, t: F.nll_loss(a.log_softmax(1), t), normal(5, 3), target),
    loss("binary_cross_entropy", F.binary_cross_entropy, unit(3, 4), unit(3, 4, seed=1)),
    loss("bce_with_logits", F.binary_cross_entropy_with_logits, x, unit(3, 4)),
    loss("kl_div", F.kl_div, x, unit(3, 4)),
    loss("poisson_nll_loss", F.poisson_nll_loss, x, positive(3, 4)),
    loss("gaussian_nll_loss", F.gaussian_nll_loss, x, y, positive(3, 4, seed=2)),
    loss("soft_margin_loss", F.soft_margin_loss, x, signs(3, 4), wrt=(0,)),
    loss("multi_margin_loss", F.multi_margin_loss, normal(5, 3), target),
    loss("hinge_embedding_loss", F.hinge_embedding_loss, x, signs(3, 4), wrt=(0,)),
    loss("margin_ranking_loss", F.margin_ranking_loss, normal(4), normal(4, seed=1), signs(4, seed=2), wrt=(0, 1)),
    loss("cosine_embedding_loss", F.cosine_embedding_loss, x, y, signs(3, seed=2), wrt=(0, 1)),
    loss("triplet_margin_loss", F.triplet_margin_loss, x, y, normal(3, 4, seed=2)),
    loss("multilabel_soft_margin_loss", F.multilabel_soft_margin_loss, x, (y > 0).float(), wrt=(0,)),
    loss("nn.MSELoss sum", nn.MSELoss(reduction="sum"), x, y),
    loss("nn.BCEWithLogitsLoss", nn.BCEWithLogitsLoss(pos_weight=positive(4)), x, unit(3, 4)),
    loss("nn.SmoothL1Loss none", nn.SmoothL1Loss(reduction="none"), x, y),
]
ours, modules = torchcalc.functional, torchcalc.nn
TORCHCALC = [
    *(
        f(f"torchcalc {name}", getattr(ours, name), x, reference=reference, compile=name == "tanh")
        for name, reference in (
            ("square", torch.square),
            ("sigmoid", torch.sigmoid),
            ("tanh", torch.tanh),
            ("relu", F.relu),
            ("gelu", F.gelu),
            ("abs", torch.abs),
            ("exp", torch.exp),
            ("silu", F.silu),
            ("mish", F.mish),
            ("softplus", F.softplus),
            ("elu", stock.elu),
            ("leaky_relu", F.leaky_relu),
            ("logsigmoid", F.logsigmoid),
            ("glu", F.glu),
        )
    ),
    f("torchcalc log", ours.log, positive(3, 4), reference=torch.log),
    f("torchcalc softcap", partial(ours.softcap, cap=2.0), x, reference=lambda x: 2 * torch.tanh(x / 2)),
    f("torchcalc swiglu", ours.swiglu, x, y, reference=lambda a, b: F.silu(a) * b),
    f("torchcalc geglu", ours.geglu, x, y, reference=lambda a, b: F.gelu(a) * b),
    f("torchcalc reglu", ours.reglu, x, y, reference=lambda a, b: F.relu(a) * b),
    f("torchcalc mlp", ours.mlp, x, normal(5, 4, seed=1), normal(2, 5, seed=2)),
    f("torchcalc gated_mlp", ours.gated_mlp, x, *(normal(5, 4, seed=k) for k in (1, 2)), normal(2, 5, seed=3)),
    f("torchcalc embedding", lambda w: ours.embedding(torch.tensor([0, 2, 2]), w), x),
    f("torchcalc dropout", partial(ours.dropout, p=0.4), x),
    f(
        "torchcalc scaled_dot_product_attention",
        ours.scaled_dot_product_attention,
        *(normal(1, 2, n, 4, seed=n) for n in (3, 4, 4)),
        reference=lambda q, k, v: ((q / 2) @ k.mT).softmax(-1) @ v,
    ),
    f("torchcalc gelu tanh", partial(ours.gelu, approximate="tanh"), x, reference=partial(F.gelu, approximate="tanh")),
    f("torchcalc softmax", partial(ours.softmax, dim=1), x, reference=partial(F.softmax, dim=1)),
    f("torchcalc log_softmax", partial(ours.log_softmax, dim=1), x, reference=partial(F.log_softmax, dim=1)),
    f(
        "torchcalc rms_norm",
        lambda x, w: ours.rms_norm(x, [4], w, 1e-3),
        x,
        normal(4, seed=1),
        reference=lambda x, w: F.rms_norm(x, [4], w, 1e-3),
    ),
    f(
        "torchcalc add_rms_norm",
        lambda x, y, w: ours.add_rms_norm(x, y, [4], w, 1e-3)[0],
        x,
        y,
        normal(4, seed=1),
        reference=lambda x, y, w: F.rms_norm(x + y, [4], w, 1e-3),
    ),
    f("torchcalc layer_norm", lambda x, w, b: ours.layer_norm(x, [4], w, b), x, normal(4, seed=1), normal(4, seed=2)),
    f(
        "torchcalc group_norm",
        lambda x, w, b: ours.group_norm(x, 2, w, b),
        normal(3, 4, 2),
        normal(4, seed=1),
        normal(4, seed=2),
        reference=lambda x, w, b: F.group_norm(x, 2, w, b),
    ),
    f("torchcalc linear", ours.linear, x, normal(2, 4, seed=1), normal(2, seed=2), reference=F.linear),
    loss(
        "torchcalc linear_cross_entropy",
        ours.linear_cross_entropy,
        normal(5, 4),
        normal(3, 4, seed=1),
        target,
        reference=stock.linear_cross_entropy,
    ),
    f("torchcalc nn.Linear", modules.Linear(4, 2), x),
    f("torchcalc nn.GELU", modules.GELU(), x, reference=nn.GELU()),
    loss("torchcalc mse_loss", ours.mse_loss, x, y, reference=F.mse_loss, compile=True),
    loss("torchcalc l1_loss", ours.l1_loss, x, y, reference=F.l1_loss),
    loss("torchcalc huber_loss", ours.huber_loss, x, y, reference=F.huber_loss),
    loss("torchcalc smooth_l1_loss", ours.smooth_l1_loss, x, y, reference=F.smooth_l1_loss),
    loss(
        "torchcalc binary_cross_entropy",
        ours.binary_cross_entropy,
        unit(3, 4),
        unit(3, 4, seed=1),
        reference=F.binary_cross_entropy,
    ),
    loss("torchcalc kl_div", ours.kl_div, x, unit(3, 4), reference=F.kl_div),
    loss("torchcalc poisson_nll_loss", ours.poisson_nll_loss, x, positive(3, 4), reference=F.poisson_nll_loss),
    loss(
        "torchcalc gaussian_nll_loss",
        ours.gaussian_nll_loss,
        x,
        y,
        positive(3, 4, seed=2),
        reference=F.gaussian_nll_loss,
    ),
    loss(
        "torchcalc binary_cross_entropy_with_logits",
        ours.binary_cross_entropy_with_logits,
        x,
        unit(3, 4),
        reference=bce_with_logits,
    ),
    loss("torchcalc cross_entropy", ours.cross_entropy, normal(5, 3), target, reference=F.cross_entropy),
    loss(
        "torchcalc cross_entropy ignore",
        partial(ours.cross_entropy, ignore_index=1),
        normal(5, 3),
        target,
        reference=partial(F.cross_entropy, ignore_index=1),
    ),
    loss(
        "torchcalc cross_entropy smoothing",
        partial(ours.cross_entropy, label_smoothing=0.2),
        normal(5, 3),
        target,
        reference=partial(F.cross_entropy, label_smoothing=0.2),
    ),
    loss(
        "torchcalc cross_entropy probabilities",
        ours.cross_entropy,
        normal(5, 3),
        normal(5, 3, seed=1).softmax(1),
        reference=F.cross_entropy,
    ),
    loss(
        "torchcalc nn.CrossEntropyLoss weight",
        modules.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 0.7])),
        normal(5, 3),
        target,
    ),
    loss("torchcalc nn.BCEWithLogitsLoss", modules.BCEWithLogitsLoss(), x, unit(3, 4), reference=bce_with_logits),
]
RIGHT = [*ELEMENTWISE, *FUNCTIONS, *LOSSES, *TORCHCALC]
