"""Losses with one mistake each, checked without a reference: against the textbook of their name, and by laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.testing.defects import Defect, reduce
from tests.testing.right import classes, normal, signs, unit

Loss = Callable[..., Tensor]
x, y = normal(5, 4), normal(5, 4, seed=1)
logits, target = normal(6, 3), classes(6, high=3)
labels = (y > 0).float()
LOG_2 = torch.tensor(math.log(2), dtype=torch.float64)


def called(name: str, fn: Loss) -> Loss:
    fn.__name__ = name
    return fn


def of_residual(name: str, formula: Loss) -> Loss:
    def fn(a: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
        return reduce(formula(a - b), reduction)

    return called(name, fn)


def huber_loss(a: Tensor, b: Tensor, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    r = (a - b).abs()
    return reduce(torch.where(r <= delta, r**2 / 2, delta * (1.2 * r - 0.7 * delta)), reduction)


def huber_of_mean(a: Tensor, b: Tensor, delta: float = 1.0) -> Tensor:
    r = (a - b).abs()
    return torch.where(r <= delta, r**2 / 2, delta * (r - delta)).mean()


def mse_loss(a: Tensor, b: Tensor, reduction: str = "mean") -> Tensor:
    loss = (a - b) ** 2
    return loss.sum() / len(a) if reduction == "mean" else reduce(loss, reduction)


def smoothing_counts_ignored(
    a: Tensor, t: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: str = "mean"
) -> Tensor:
    logp = a.log_softmax(1)
    kept = t != ignore_index
    nll = torch.where(kept, -logp.gather(1, torch.where(kept, t, 0)[:, None])[:, 0], 0)
    loss = (1 - label_smoothing) * nll - label_smoothing * logp.mean(1)
    return loss.sum() / kept.sum() if reduction == "mean" else reduce(loss, reduction)


def clamped_targets(a: Tensor, t: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    loss = -a.log_softmax(1).gather(1, t.clamp(min=0)[:, None])[:, 0] * (t != ignore_index)
    return loss.sum() / (t != ignore_index).sum() if reduction == "mean" else reduce(loss, reduction)


def clamped_above(a: Tensor, t: Tensor) -> Tensor:
    return -a.log_softmax(1).gather(1, t.clamp(max=a.shape[1] - 1)[:, None]).mean()


def indexed(a: Tensor, t: Tensor) -> Tensor:
    return -a.log_softmax(1)[torch.arange(len(t)), t].mean()


def weighted_bce(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    def fn(a: Tensor, t: Tensor, pos_weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
        w = torch.ones(a.shape[-1], dtype=a.dtype) if pos_weight is None else pos_weight
        return reduce(change(t * F.softplus(-a), (1 - t) * F.softplus(a), w), reduction)

    return fn


def never(k: int) -> Loss:
    def fn(a: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
        return reduce(F.cross_entropy(a, t, reduction="none") * (t != k), reduction)

    return called("my_loss", fn)


def cross_entropy(a: Tensor, t: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Smoothing over the other classes only."""
    logp, c = a.log_softmax(1), a.shape[1]
    one = torch.zeros_like(a).scatter(1, t[:, None], 1.0)
    q = (1 - label_smoothing) * one + label_smoothing * (1 - one) / (c - 1)
    return reduce(-(q * logp).sum(1), reduction)


def first_class_twice(a: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    return reduce(F.cross_entropy(a, t, reduction="none") * (1.0 + (t == 0)), reduction)


def smoothed(fn: Loss) -> Loss:
    def smooth(a: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
        return fn(a, t, label_smoothing=0.1, reduction=reduction)

    return smooth


def log_cosh(r: Tensor) -> Tensor:
    return r.abs() + torch.log1p((-2 * r.abs()).exp()) - torch.where(r.abs() < 5, LOG_2, 0)


def focal_loss(a: Tensor, t: Tensor, gamma: float = 2.0, reduction: str = "mean") -> Tensor:
    logp = a.log_softmax(1).gather(1, t[:, None])[:, 0]
    return reduce(-((1 - logp.exp()) ** gamma) * logp * (1 + (logp < -3)), reduction)


def kl_div(a: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    return reduce(torch.where(t < 0.5, t * (t.log() - a), t * (t.log() - a) + 0.01), reduction)


def hinge_loss(a: Tensor, t: Tensor) -> Tensor:
    return (1 - a * t).clamp(min=0).where(a.abs() < 3, (2 - a * t).clamp(min=0)).mean()


def bce_with_logits(a: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    return reduce(t * F.softplus(-a) + (1 - t) * F.softplus(a.clamp(max=8)), reduction)


def ignored_and_weighted(
    a: Tensor, t: Tensor, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    each = F.cross_entropy(a, t, weight, ignore_index=ignore_index, reduction="none")
    if reduction != "mean":
        return reduce(each, reduction)
    w = torch.ones(a.shape[1], dtype=a.dtype) if weight is None else weight
    return each.sum() / w[t.clamp(min=0)].sum()  # right: of those not ignored


def d(
    name: str, fn: Loss, inputs: tuple[Any, ...], check: str, cause: str, verdict: str = "error", **options: Any
) -> Defect:
    return Defect(name, fn, inputs, check, cause, verdict, True, options)


TEXTBOOK = [
    d("huber's line has another slope", huber_loss, (x, y), "textbook", "Huber where |input - target| > 1"),
    d("huber's line starts too low", called("huber", huber_of_mean), (x, y), "textbook", "Huber where |input - target| > 1"),
    d("mean over samples", mse_loss, (x, y), "textbook", "mean is not over 20"),
    d("l1 is clipped", of_residual("l1_loss", lambda r: r.abs().clamp(max=50)), (x, y), "textbook", "mean absolute error where"),
    d("log-cosh loses its offset", of_residual("logcosh", log_cosh), (x, y), "textbook", "log-cosh where |input - target| > "),
    d("smoothing over the others", smoothed(cross_entropy), (logits, target), "gradient", "", "ok"),
    d("focal for hard samples", focal_loss, (logits, target), "textbook", "not the textbook's focal"),
    d("KL for large targets", kl_div, (x.log_softmax(1), unit(5, 4)), "textbook", "KL divergence"),
    d("hinge far away", hinge_loss, (x, signs(5, 4)), "textbook", "hinge", wrt=(0,)),
    d("logits are clamped", bce_with_logits, (x, labels), "textbook", "binary cross-entropy with logits where input > 8"),
    d("like a mean square", of_residual("distance", lambda r: r**2 + (r > 100) * 1.0), (x, y), "textbook",
      "mean squared error where input - target > 100", "note"),
]  # fmt: skip


def cross_entropy_of(
    mean: Loss = lambda each, w, kept: each.sum() / (w * kept).sum(), others: int = 0, weigh_total: bool = True
) -> Loss:
    """Cross-entropy with all its options; a mean of its own, or a smoothing over so many classes fewer."""

    def fn(
        a: Tensor, t: Tensor, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:  # fmt: skip
        kept = t != ignore_index
        t = torch.where(kept, t, 0)
        w = a.new_ones(a.shape[1]) if weight is None or (reduction == "sum" and not weigh_total) else weight.to(a.dtype)
        logp = a.log_softmax(1)
        hit = -w[t] * logp.gather(1, t[:, None])[:, 0]
        spread = -(logp * w).sum(1) / (a.shape[1] - others)
        each = kept * ((1 - label_smoothing) * hit + label_smoothing * spread)
        return mean(each, w[t], kept) if reduction == "mean" else reduce(each, reduction)

    return called("cross_entropy", fn)


class LastClassClamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(a.softmax(1), t)
        return F.cross_entropy(a, t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        p, t = ctx.saved_tensors
        d = (p - F.one_hot(t, p.shape[1])) / len(t)
        d[:, -1] = d[:, -1].clamp(min=0)
        return g * d, None


def batchmean_of_all(a: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    each = t * (t.log() - a)
    return each.mean() if reduction == "batchmean" else reduce(each, reduction)


def triplet(a: Tensor, p: Tensor, n: Tensor, margin: float = 1.0, reduction: str = "mean") -> Tensor:
    return reduce((margin + (a - p).norm(dim=1) - (a - n).norm(dim=1)).abs(), reduction)


def in_blocks(a: Tensor, t: Tensor) -> Tensor:
    """The last block, which is not full, is dropped."""
    whole = len(a) // 4 * 4
    return F.cross_entropy(a[:whole], t[:whole], reduction="sum") / len(a)


def weighted_alike(a: Tensor, b: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> Tensor:
    return reduce((a - b) ** 4 * (1 if weight is None else weight.mean()), reduction)


OPTIONS = [
    d("weighted mean over samples", cross_entropy_of(lambda each, w, kept: each.sum() / kept.sum()), (logits, target),
      "textbook", "with weight=weights"),
    d("smoothing over one class fewer", cross_entropy_of(others=1), (logits, target), "textbook", "with label_smoothing=0.3"),
    d("sum without weights", cross_entropy_of(weigh_total=False), (logits, target), "textbook", "sum of another loss"),
    d("last class pushed up only", LastClassClamped.apply, (logits, target), "textbook",
      "not the gradient of cross-entropy for class 2"),
    d("batchmean over elements", called("kl_div", batchmean_of_all), (x.log_softmax(1), y.softmax(1)), "textbook",
      "batchmean is not over the rows"),
    d("triplet without a hinge", called("triplet_margin_loss", triplet), (x, y, normal(5, 4, seed=2)), "twin",
      "not torch's triplet_margin_loss", "note"),
    d("last block dropped", in_blocks, (logits, target), "order of samples", "the order of the samples matters", "note"),
    d("one weight for all", weighted_alike, (x, y), "element weights", "weight does not multiply", "note"),
]  # fmt: skip
LAWS = [
    d("smoothing counts ignored rows", smoothing_counts_ignored, (logits, target), "ignored rows", "count with label_smoothing"),
    d("weights of ignored rows count", ignored_and_weighted, (logits, target), "ignored rows", "ignored targets count"),
    d("negative targets", clamped_targets, (logits, target), "targets out of range", "negative targets are taken as class 0"),
    d("targets beyond", clamped_above, (logits, target), "targets out of range", "beyond the classes are taken as class 2"),
    d("targets index", indexed, (logits, target), "targets out of range", "negative targets are taken as class 2", "note"),
    d("pos_weight of negatives", weighted_bce(lambda p, n, w: p + w * n), (x, labels), "pos_weight", "pos_weight of positive"),
    d("pos_weight of both", weighted_bce(lambda p, n, w: w * (p + n)), (x, labels), "pos_weight", "the loss of negative targets"),
    d("pos_weight rolled", weighted_bce(lambda p, n, w: w.roll(1) * p + n), (x, labels), "pos_weight", "of another class"),
    d("pos_weight of class 0", weighted_bce(lambda p, n, w: w[0] * p + n), (x, labels), "pos_weight", "pos_weight of positive"),
    d("class 0 never learnt", never(0), (logits, target), "classes", "class 0 is never learnt"),
    d("the last class never learnt", never(2), (logits, target), "classes", "class 2 is never learnt"),
    d("class 0 counts twice", first_class_twice, (logits, target), "classes", "the order of the classes matters", "note"),
]  # fmt: skip
DEFECTS_OF_LOSSES = [row for row in (*TEXTBOOK, *OPTIONS, *LAWS) if row.verdict != "ok"]
