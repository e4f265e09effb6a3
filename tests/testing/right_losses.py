"""Right losses that resemble those of the textbooks, or have no reference at all: none may have an error."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.testing.defects import reduce
from tests.testing.right import classes, loss, normal, positive, signs, unit

x, y = normal(3, 4), normal(3, 4, seed=1)
logits, target = normal(5, 3), torch.tensor([0, 1, 2, 1, 0])
labels = (y > 0).float()


def contrastive(z: Tensor) -> Tensor:
    """NT-Xent: row i belongs to row i + n/2."""
    n, z = len(z), F.normalize(z, dim=1)
    similar = (z @ z.mT / 0.5).masked_fill(torch.eye(n, dtype=torch.bool), -1e9)
    return F.cross_entropy(similar, (torch.arange(n) + n // 2) % n)


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """CLIP's: row i of one belongs to row i of the other."""
    similar = F.normalize(a, dim=1) @ F.normalize(b, dim=1).mT / 0.1
    index = torch.arange(len(a))
    return (F.cross_entropy(similar, index) + F.cross_entropy(similar.mT, index)) / 2


def z_loss(a: Tensor, t: Tensor, ignore_index: int = -100) -> Tensor:
    """That of rows of log-probabilities is their negative log-likelihood."""
    kept = t != ignore_index
    pull = (a.logsumexp(1).square() * kept).sum()
    return (F.cross_entropy(a, t, ignore_index=ignore_index, reduction="sum") + 0.01 * pull) / kept.sum()


def triplet_loss(a: Tensor, p: Tensor, n: Tensor, margin: float = 0.2) -> Tensor:
    """FaceNet's, of squared distances."""
    return ((a - p).square().sum(1) - (a - n).square().sum(1) + margin).relu().mean()


def kl_div(a: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    return reduce(t * (t.log() - a), reduction)


def focal(a: Tensor, t: Tensor, gamma: float = 2.0, reduction: str = "mean") -> Tensor:
    logp = a.log_softmax(1).gather(1, t[:, None])[:, 0]
    return reduce(-((1 - logp.exp()) ** gamma) * logp, reduction)


def sigmoid_focal(a: Tensor, t: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "mean") -> Tensor:
    p = a.sigmoid()
    right = p * t + (1 - p) * (1 - t)
    each = F.binary_cross_entropy_with_logits(a, t, reduction="none") * (1 - right) ** gamma
    return reduce((alpha * t + (1 - alpha) * (1 - t)) * each, reduction)


def dice(a: Tensor, t: Tensor) -> Tensor:
    p = a.sigmoid()
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def pseudo_huber(a: Tensor, b: Tensor, delta: float = 1.0) -> Tensor:
    return (delta**2 * ((1 + ((a - b) / delta) ** 2).sqrt() - 1)).mean()


def clipped_mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().clamp(max=1).mean()


def asymmetric_huber(a: Tensor, b: Tensor, delta: float = 1.0) -> Tensor:
    r = (a - b) * torch.where(a > b, 2.0, 1.0)
    return torch.where(r.abs() < delta, r**2 / 2, delta * (r.abs() - delta / 2)).mean()


def quantile(a: Tensor, b: Tensor, q: float = 0.3) -> Tensor:
    return torch.maximum(q * (b - a), (q - 1) * (b - a)).mean()


def smoothed_by_hand(a: Tensor, t: Tensor) -> Tensor:
    logp = a.log_softmax(1)
    return (-0.9 * logp.gather(1, t[:, None])[:, 0] - 0.1 * logp.mean(1)).mean()


def ordinal(a: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(a, (t[:, None] > torch.arange(2)).to(a.dtype))


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    return (-0.5 * (1 + log_variance - mean**2 - log_variance.exp())).sum(1).mean()


RIGHT_LOSSES = [
    loss("contrastive", contrastive, normal(6, 4)),
    loss("CLIP", pairs, normal(4, 3), normal(4, 3, seed=1)),
    loss("indexed", lambda a, t: -a.log_softmax(1)[torch.arange(len(t)), t].mean(), logits, target),
    loss("focal", focal, logits, target),
    loss("sigmoid focal", sigmoid_focal, x, labels),
    loss("dice", dice, x, labels),
    loss("log-cosh", lambda a, b: ((a - b).abs() + F.softplus(-2 * (a - b).abs()) - math.log(2)).mean(), x, y),
    loss("pseudo-Huber", pseudo_huber, x, y),
    loss("clipped mse", clipped_mse, x, y),
    loss("asymmetric Huber", asymmetric_huber, x, y),
    loss("quantile", quantile, x, y),
    loss("smoothed by hand", smoothed_by_hand, logits, target),
    loss("ordinal", ordinal, normal(5, 2), target),
    loss("background ignored", partial(F.cross_entropy, ignore_index=0), logits, target),
    loss("VAE", divergence, x, y),
    loss("sum over features", lambda a, b: ((a - b) ** 2).sum(1).mean(), x, y),
    loss("batchmean", partial(F.kl_div, reduction="batchmean"), x.log_softmax(1), y.softmax(1)),
    loss("log_target", partial(F.kl_div, log_target=True), x.log_softmax(1), y.log_softmax(1)),
    loss("hinge", lambda a, t: (1 - a * t).clamp(min=0).mean(), x, signs(3, 4), wrt=(0,)),
    loss("z-loss", lambda a, t: F.cross_entropy(a, t) + 0.01 * a.logsumexp(1).square().mean(), logits, target),
    loss("margin", lambda a, t: F.cross_entropy(a - 0.3 * F.one_hot(t, 3), t), logits, target),
    loss("pos_weight", nn.BCEWithLogitsLoss(pos_weight=positive(4)), x, labels),
    loss(
        "weights and smoothing", nn.CrossEntropyLoss(torch.tensor([0.2, 1, 0.7]), label_smoothing=0.1), logits, target
    ),
    loss("ignored targets", nn.CrossEntropyLoss(ignore_index=-1), logits, torch.tensor([0, -1, 2, 1, -1])),
    loss("2d", nn.CrossEntropyLoss(), normal(2, 3, 2, 2), classes(2, 2, 2, high=3)),
    loss("full Poisson", nn.PoissonNLLLoss(full=True), x, positive(3, 4) * 3),
    loss("full Gaussian", nn.GaussianNLLLoss(full=True), x, y, positive(3, 4)),
    loss("huber", nn.HuberLoss(delta=0.5), x, y),
    loss("smooth L1", nn.SmoothL1Loss(beta=0.3), x, y),
    loss("bce", nn.BCELoss(), unit(3, 4), labels),
    loss("squared margin", lambda a, t: F.multi_margin_loss(a, t, p=2), logits, target),
    loss(
        "CTC",
        nn.CTCLoss(),
        normal(6, 2, 4).log_softmax(2),
        classes(2, 3, high=3) + 1,
        torch.tensor([6, 6]),
        torch.tensor([3, 2]),
    ),
    loss("soft margin", nn.SoftMarginLoss(), x, signs(3, 4), wrt=(0,)),
    loss("z-loss and ignored", z_loss, logits, target),
    loss("squared triplet", triplet_loss, x, y, normal(3, 4, seed=2)),
    loss("KL without batchmean", kl_div, x.log_softmax(1), y.softmax(1)),
    loss("masked", lambda a, b, m: ((a - b) ** 2 * m).sum() / m.sum(), x, y, normal(3, 4, seed=5) > 0),
]
