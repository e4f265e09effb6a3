"""Losses as the textbooks have them: a formula in float64 for each family, its options, and inputs that tell it apart.

A formula takes (input, target, option), or (input, target, variance, option), where option(name, default) is the value
that the loss under test has for an option, and gives the loss of each element, or of each row of logits for the families
of classes. References: the losses of torch.nn.functional; Huber 1964 for huber; Lin et al. 2017, arXiv:1708.02002, for
the focal losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Family"]

Option = Callable[[str, Any], Any]
Formula = Callable[..., Tensor]


@dataclass(frozen=True)
class Family:
    """A loss by name.

    Attributes:
        name: for the report.
        words: the names that it goes by, without "loss".
        formula: the loss of each element or row.
        probes: inputs and targets over all its regions, and variances where it takes them.
        classes: whether input is rows of logits and target their classes.
        option: an option that losses of this family have, and few others.
    """

    name: str
    words: tuple[str, ...]
    formula: Formula
    probes: Callable[[], tuple[Tensor, ...]]
    classes: bool = False
    option: str = ""


def residuals() -> tuple[Tensor, Tensor]:
    """Input and target that differ by 1e-3 to 300, either way."""
    size = 10.0 ** torch.linspace(-3, 2.5, 24, dtype=torch.float64, device="cpu")
    r = torch.cat([size, -size])
    target = torch.linspace(-2, 2, len(r), dtype=torch.float64, device="cpu")
    return target + r, target


def logits() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-12, 12, 48, dtype=torch.float64, device="cpu")
    return x, torch.tensor([0.0, 1.0, 0.3], dtype=torch.float64, device="cpu").repeat(16)


def probabilities() -> tuple[Tensor, Tensor]:
    x, t = logits()
    return (x / 2).sigmoid(), t


def signed() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-4, 4, 48, dtype=torch.float64, device="cpu")
    return x, torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu").repeat(24)


def counts() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0.1, 3, 40, dtype=torch.float64, device="cpu")
    return x, torch.arange(40, dtype=torch.float64, device="cpu") % 8


def shares() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-4, -0.1, 40, dtype=torch.float64, device="cpu")
    return x, torch.linspace(0.05, 0.95, 40, dtype=torch.float64, device="cpu")


def mse(x: Tensor, t: Tensor, option: Option) -> Tensor:
    return (x - t) ** 2


def l1(x: Tensor, t: Tensor, option: Option) -> Tensor:
    return (x - t).abs()


def huber(x: Tensor, t: Tensor, option: Option) -> Tensor:
    d, r = float(option("delta", 1.0)), (x - t).abs()
    return torch.where(r <= d, r**2 / 2, d * (r - d / 2))


def smooth_l1(x: Tensor, t: Tensor, option: Option) -> Tensor:
    b, r = float(option("beta", 1.0)), (x - t).abs()
    return torch.where(r < b, r**2 / (2 * b), r - b / 2) if b else r


def log_cosh(x: Tensor, t: Tensor, option: Option) -> Tensor:
    r = (x - t).abs()
    return r + torch.log1p(torch.exp(-2 * r)) - math.log(2)


def pinball(x: Tensor, t: Tensor, option: Option) -> Tensor:
    q = next((v for name in ("q", "tau", "quantile") if (v := option(name, None)) is not None), 0.5)
    return torch.maximum(q * (t - x), (q - 1) * (t - x))


def bce(x: Tensor, t: Tensor, option: Option) -> Tensor:
    return -(t * x.log().clamp(min=-100) + (1 - t) * (-x).log1p().clamp(min=-100))


def bce_with_logits(x: Tensor, t: Tensor, option: Option) -> Tensor:
    weight = option("pos_weight", None)
    p = 1.0 if weight is None else weight if isinstance(weight, float) else weight.double().reshape(-1)[0]
    return p * t * softplus(-x) + (1 - t) * softplus(x)


def softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def sigmoid_focal(x: Tensor, t: Tensor, option: Option) -> Tensor:
    alpha, gamma = option("alpha", None), float(option("gamma", 2.0))
    p = x.sigmoid()
    right = p * t + (1 - p) * (1 - t)
    loss = (t * softplus(-x) + (1 - t) * softplus(x)) * (1 - right) ** gamma
    return loss if alpha is None or alpha < 0 else loss * (alpha * t + (1 - alpha) * (1 - t))


def kl_div(x: Tensor, t: Tensor, option: Option) -> Tensor:
    return t.exp() * (t - x) if option("log_target", False) else torch.xlogy(t, t) - t * x


def poisson(x: Tensor, t: Tensor, option: Option) -> Tensor:
    log_input, eps = option("log_input", True), float(option("eps", 1e-8))
    loss = x.exp() - t * x if log_input else x - t * (x + eps).log()
    if option("full", False):
        stirling = torch.xlogy(t, t) - t + 0.5 * (2 * math.pi * t.clamp(min=1)).log()
        loss = loss + torch.where(t > 1, stirling, 0)
    return loss


def variances() -> tuple[Tensor, Tensor, Tensor]:
    x, t = residuals()
    return x, t, torch.logspace(-2, 2, 7, dtype=torch.float64, device="cpu").repeat(7)[: len(x)]


def gaussian(x: Tensor, t: Tensor, variance: Tensor, option: Option) -> Tensor:
    v = variance.clamp(min=float(option("eps", 1e-6)))
    loss = (v.log() + (x - t) ** 2 / v) / 2
    return loss + math.log(2 * math.pi) / 2 if option("full", False) else loss


def hinge(x: Tensor, t: Tensor, option: Option) -> Tensor:
    return (1 - x * t).clamp(min=0)


def squared_hinge(x: Tensor, t: Tensor, option: Option) -> Tensor:
    return (1 - x * t).clamp(min=0) ** 2


def soft_margin(x: Tensor, t: Tensor, option: Option) -> Tensor:
    return softplus(-x * t)


def rows() -> tuple[Tensor, Tensor]:
    """A placeholder: rows of logits have as many classes as the example."""
    return residuals()


def log_probability(x: Tensor, t: Tensor) -> Tensor:
    return x.gather(1, t[:, None])[:, 0] - x.logsumexp(1)


def cross_entropy(x: Tensor, t: Tensor, option: Option) -> Tensor:
    smoothing, weight = float(option("label_smoothing", 0.0) or 0.0), option("weight", None)
    w = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)
    kept = t != option("ignore_index", -100)
    t = torch.where(kept, t, 0)
    spread = -((x - x.logsumexp(1, keepdim=True)) * w).sum(1) / x.shape[1]
    return kept * (-(1 - smoothing) * w[t] * log_probability(x, t) + smoothing * spread)


def nll(x: Tensor, t: Tensor, option: Option) -> Tensor:
    weight = option("weight", None)
    w = x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)
    kept = t != option("ignore_index", -100)
    t = torch.where(kept, t, 0)
    return -(kept * w[t] * x.gather(1, t[:, None])[:, 0])


def focal(x: Tensor, t: Tensor, option: Option) -> Tensor:
    alpha, gamma = option("alpha", None), float(option("gamma", 2.0))
    log_p = log_probability(x, t)
    loss = -((1 - log_p.exp()) ** gamma) * log_p
    return loss if alpha is None else float(alpha) * loss


def multi_margin(x: Tensor, t: Tensor, option: Option) -> Tensor:
    p, margin = int(option("p", 1)), float(option("margin", 1.0))
    gap = (margin - x.gather(1, t[:, None]) + x).clamp(min=0) ** p
    return gap.scatter(1, t[:, None], 0.0).sum(1) / x.shape[1]


FAMILIES = (
    Family("mean squared error", ("mse", "l2", "squarederror", "meansquarederror"), mse, residuals),
    Family("mean absolute error", ("l1", "mae", "absoluteerror", "meanabsoluteerror"), l1, residuals),
    Family("Huber", ("huber",), huber, residuals, option="delta"),
    Family("smooth L1", ("smoothl1",), smooth_l1, residuals, option="beta"),
    Family("log-cosh", ("logcosh",), log_cosh, residuals),
    Family("pinball", ("pinball", "quantile"), pinball, residuals),
    Family("binary cross-entropy", ("bce", "binarycrossentropy"), bce, probabilities),
    Family("binary cross-entropy with logits", ("bcewithlogits", "bcelogits", "binarycrossentropywithlogits", "sigmoidbce"),
           bce_with_logits, logits),
    Family("sigmoid focal", ("focal", "sigmoidfocal", "binaryfocal", "focalbce"), sigmoid_focal, logits, option="gamma"),
    Family("KL divergence", ("kldiv", "kl", "kldivergence"), kl_div, shares, option="log_target"),
    Family("Poisson", ("poissonnll", "poisson"), poisson, counts, option="log_input"),
    Family("Gaussian", ("gaussiannll", "gaussian"), gaussian, variances),
    Family("hinge", ("hinge",), hinge, signed),
    Family("squared hinge", ("squaredhinge", "sqhinge"), squared_hinge, signed),
    Family("soft margin", ("softmargin", "logistic"), soft_margin, signed),
    Family("cross-entropy", ("crossentropy", "ce", "softmaxcrossentropy"), cross_entropy, rows, True),
    Family("negative log-likelihood", ("nll",), nll, rows, True),
    Family("focal", ("focal", "softmaxfocal", "focalce"), focal, rows, True, "gamma"),
    Family("multi-margin", ("multimargin",), multi_margin, rows, True),
)  # fmt: skip
