"""Which learning rate?  Raise it at every step, from far too small to far too large, and look where the loss falls fastest.

The rates are even in s = log₁₀ η, so the slope that matters is dL/ds. It has to be taken through noise, whose standard
deviation σ second differences tell, as what is smooth has small ones:

    σ² = median((L_{i-1} − 2L_i + L_{i+1})²) / (0.455·6)        (0.455: the median of χ² with one degree of freedom)   (1)

A straight line fitted to the losses around s with Gaussian weights wᵢ of width h has the slope

    b(s) = Σ wᵢ(sᵢ − s̄)Lᵢ / Σ wᵢ(sᵢ − s̄)²,     s̄ = Σ wᵢsᵢ / Σ wᵢ,                                                    (2)
    SE(b)² = σ²·Σ wᵢ²(sᵢ − s̄)² / (Σ wᵢ(sᵢ − s̄)²)².                                                                   (3)

A wide window averages noise away, and blurs the curve: h is the least of several widths at which the steepest fall
stands out from its own error. The suggestion is the rate where b is least, before the loss explodes; the interval is
the rates around it at which the fall is at least half as steep.

Reference: Smith 2015, arXiv:1506.01186; local regression: Cleveland 1979, doi:10.2307/2286407.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchcalc.calculus.random_numbers import random_numbers_kept
from torchcalc.calculus.training_loss import Batch, held_batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RangeTest", "range_test", "suggest"]

WIDTHS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # h in decades, from sharp to blurred
STANDS_OUT = 10.0  # standard errors: where noise grows with the loss, (1) is too small by half in places
DOUBT = 2.0  # standard errors by which each slope is taken to be less steep than it seems: at the ends they are large
CHANCE = 4.0  # standard errors of the steepest fall, which of so many slopes is steep by chance alone
EXPLODES = 0.1  # of the largest fall, by which the loss has risen again where it is no longer stable
STOP = 10.0  # times what the losses differ by, above the first: the rest of the range can only be worse


@dataclass(frozen=True)
class RangeTest:
    """A range test's curve, and what it says.

    Attributes:
        lrs: float64 (n,), the rates tried.
        losses: float64 (n,), the loss after the step with each of them; nan beyond an explosion.
        smooth: float64 (n,), the losses smoothed by (2); nan beyond an explosion.
        suggestion: the rate where the smoothed loss falls fastest; nan if it falls nowhere.
        interval: the rates around it where it falls at least half as fast.
        largest_stable: the largest rate before the loss rises again, or is not finite; nan if it falls nowhere.
        beyond: what the loss was seen to do beyond that: "rises", "is not finite", or nothing.

    >>> lrs = torch.logspace(-5, 1, 100)
    >>> found = suggest(lrs, 2 - 1.5 * torch.sigmoid(6 * (lrs.log10() + 2)) + (lrs > 1) * lrs)
    >>> found.suggestion < found.largest_stable, found.beyond
    (True, 'rises')
    """

    lrs: Tensor
    losses: Tensor
    smooth: Tensor
    suggestion: float
    interval: tuple[float, float]
    largest_stable: float
    beyond: Literal["", "rises", "is not finite"] = ""

    def __str__(self) -> str:
        if math.isnan(self.suggestion):
            return f"range test: no rate from {float(self.lrs[0]):.2g} to {float(self.lrs[-1]):.2g} lowers the loss"
        low, high = self.interval
        beyond = "at none that was tried it rises"
        if self.beyond:
            beyond = f"beyond {self.largest_stable:.2g} it {self.beyond}"
        if self.beyond == "is not finite":
            beyond += f", after {float(self.losses[self.losses.isfinite()][-1]):.3g}"
        return (
            f"range test: lr = {self.suggestion:.2g} (from {low:.2g} to {high:.2g} the loss falls at least half as fast; "
            f"{beyond})"
        )

    def figure(self) -> Figure:
        """The curve, the suggestion with its interval, and where stability ends; needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("figures need matplotlib: pip install 'torchcalc[recipes]'") from error
        figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
        ax = figure.subplots()
        ax.plot(self.lrs, self.losses, ".", color="#999999", markersize=4, label="loss after the step")
        ax.plot(self.lrs, self.smooth, color="#0072B2", label="smoothed")
        if not math.isnan(self.suggestion):
            ax.axvspan(*self.interval, color="#009E73", alpha=0.15, label="falls at least half as fast")
            ax.axvline(self.suggestion, color="#009E73", label=f"suggestion {self.suggestion:.2g}")
            ax.axvline(
                self.largest_stable, color="#D55E00", linestyle="--", label=f"stable up to {self.largest_stable:.2g}"
            )
        seen = self.smooth[self.smooth.isfinite()]
        if seen.numel():
            low, high = float(seen.min()), max(float(seen[0]), float(seen.median()))
            room = max(high - low, 1e-12)
            ax.set_ylim(low - 0.15 * room, high + 0.35 * room)
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Range test")
        ax.legend(fontsize=10, frameon=False)
        return figure


def suggest(lrs: Sequence[float] | Tensor, losses: Sequence[float] | Tensor) -> RangeTest:
    """What a curve of losses against learning rates says.

    Args:
        lrs: (n,), n >= 5, positive and rising, about evenly in their logarithm.
        losses: (n,), the loss after a step with each; what follows the first that is not finite does not count. There inf
            says that the loss rose, nan and -inf that it was not finite.

    Raises:
        ValueError: lengths that differ or are below 5; rates that are not positive and rising.

    >>> lrs = torch.logspace(-5, 1, 100)
    >>> losses = 2 - 1.5 * torch.sigmoid(6 * (lrs.log10() + 2)) + (lrs > 1) * lrs  # steepest at 10⁻²
    >>> 0.008 < suggest(lrs, losses).suggestion < 0.012
    True
    """
    lr, loss = (torch.as_tensor(x, dtype=torch.float64, device="cpu").detach().flatten() for x in (lrs, losses))
    if lr.numel() != loss.numel() or lr.numel() < 5:
        raise ValueError(f"lrs, losses: lengths {lr.numel()} and {loss.numel()}; both must be the same, at least 5")
    if not (bool((lr > 0).all()) and bool((lr.diff() > 0).all())):
        raise ValueError("lrs: they must be positive and rise from each to the next")
    loss = loss.clone()
    broken = (~loss.isfinite()).nonzero()
    n = int(broken[0]) if broken.numel() else loss.numel()
    after: Literal["", "rises", "is not finite"] = ""
    if broken.numel():
        after = "rises" if float(loss[n]) == math.inf else "is not finite"
    loss[n:] = math.nan
    nothing = RangeTest(lr, loss, torch.full_like(loss, math.nan), math.nan, (math.nan, math.nan), math.nan)
    if n < 5:
        return nothing
    s, y = lr[:n].log10(), loss[:n]
    y = y.clamp(max=float(y[0]) + 2 * float(y[0] - y.min()) + 1e-12)  # the height of an explosion says nothing
    sigma = _noise(y)
    for h in WIDTHS:
        level, slope, error = _local_lines(s, y, h, sigma)
        end = max(_explosion(level), int(y.argmin()))  # smoothing lets a steep rise begin too early
        doubtful = slope + DOUBT * error
        doubtful[: min(int((s < s[0] + h).sum()), end)] = math.inf  # a line that looks one way only
        steepest = int(doubtful[: end + 1].argmin())
        if -slope[steepest] > STANDS_OUT * error[steepest]:
            break
    smooth = torch.full_like(loss, math.nan)
    smooth[:n] = level
    fall = -slope[: end + 1]
    if not -slope[steepest] > max(CHANCE * float(error[steepest]), 1e-12 * float(y.abs().max())):
        return RangeTest(lr, loss, smooth, math.nan, (math.nan, math.nan), math.nan)
    low = high = steepest
    while low > 0 and fall[low - 1] >= fall[steepest] / 2:
        low -= 1
    while high < end and fall[high + 1] >= fall[steepest] / 2:
        high += 1
    interval = float(lr[low]), float(lr[high])
    return RangeTest(lr, loss, smooth, float(lr[steepest]), interval, float(lr[end]), "rises" if end < n - 1 else after)


def _noise(y: Tensor) -> float:
    """(1), of at least 3 losses."""
    curvature = y[:-2] - 2 * y[1:-1] + y[2:]
    return math.sqrt(float(curvature.square().median()) / (0.455 * 6))


def _local_lines(s: Tensor, y: Tensor, h: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Level, slope and the slope's standard error of lines fitted around each s."""
    w = torch.exp(-0.5 * ((s[None, :] - s[:, None]) / h) ** 2)
    w = w / w.sum(1, keepdim=True)
    centred = s[None, :] - w @ s[:, None]
    spread = (w * centred**2).sum(1)
    slope = (w * centred) @ y / spread  # (2)
    error = sigma * (w * centred).square().sum(1).sqrt() / spread  # (3)
    level = w @ y + slope * (s - w @ s)
    return level, slope, error


def _explosion(level: Tensor) -> int:
    """Where a curve begins to rise for good, by a part of what it fell; momentum makes it ring before. Else its last place."""
    low = level <= level.min() + EXPLODES * (level[0] - level.min()).clamp(min=1e-12)
    end = int(low.nonzero()[-1])
    if end < level.numel() - 1:
        while end > 1 and level[end - 1] < level[end]:
            end -= 1
    return max(end, 1)


def range_test(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Batch | Iterable[Batch],
    optimizer: Optimizer,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
) -> RangeTest:
    """Train a few steps at rising learning rates, then put everything back; tell which rate to train with.

    Step i takes batch i mod n at the rate low·(high/low)^(i/(steps − 1)). The loss after it is that of the next batch,
    less that batch's loss at the start, plus the mean of all batches' at the start: batches are of different difficulty.
    The test ends early where the loss explodes. Afterwards parameters, buffers, gradients, the optimizer with its state
    and rates, training mode and random number generators are as they were, to the bit, also after an error.

    Args:
        model: in the mode in which it will be trained; on the device on which it is.
        loss: ``loss(output, target)``, a scalar tensor.
        batches: one ``(x, y)`` or an iterable of them, held and moved to the model's device; x may be a tuple of arguments.
        optimizer: any whose ``step`` needs no closure, holding the model's parameters. Of several groups, rates are
            those of the group with the largest lr, and the ratios between them are kept; where all lr are 0, as at the
            start of a warm-up, those of ``initial_lr``.
        low, high: the range of rates, 0 < low < high.
        steps: rates to try, >= 5. Momentum wants more of them: the rate should not change much in 1/(1 − μ) steps.

    Raises:
        TypeError: the optimizer is none, or is LBFGS; batches is no iterable.
        ValueError: an argument out of range; no batch; the optimizer holds none of the model's trainable parameters; the loss
            is no scalar, has no graph, or is not finite before the first step.

    Reference: Smith 2015, arXiv:1506.01186.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(2, 1)
    >>> x = torch.randn(64, 2)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> found = range_test(model, nn.functional.mse_loss, (x, x.sum(1, keepdim=True)), sgd)
    >>> 0.01 < found.suggestion < 0.1 < found.largest_stable < 10
    True
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low={low}, high={high}: they must be 0 < low < high, finite")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: {optimizer!r}; it must be a torch.optim.Optimizer, made from model.parameters()")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer: LBFGS needs a closure and searches for its own step; pass one whose step needs none"
        )
    if not (isinstance(steps, int) and steps >= 5):
        raise ValueError(f"steps: {steps}; it must be an int, at least 5")
    trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    of_model = [p for p in model.parameters() if p in trained]
    if not of_model:
        raise ValueError(
            "optimizer: it holds none of the model's trainable parameters; make it from model.parameters()"
        )
    held = held_batches(batches, of_model[0].device)

    def evaluate(i: int) -> Tensor:
        x, y = held[i % len(held)]
        value = loss(model(*x) if isinstance(x, tuple) else model(x), y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss returned {what}; it must return a scalar tensor: use reduction='mean'")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError("loss: its value has no graph; compute it from the model's output, without .detach()")
        return value

    with torch.inference_mode(False), _everything_restored(model, optimizer), torch.enable_grad():
        lrs = torch.logspace(math.log10(low), math.log10(high), steps, dtype=torch.float64, device="cpu")
        losses = torch.full_like(lrs, math.nan)
        ratios = _ratios(optimizer)
        with torch.no_grad():
            starts = [float(evaluate(i)) for i in range(len(held))]
        mean = sum(starts) / len(starts)
        if not math.isfinite(mean):
            raise ValueError(f"loss: it is {mean} before the first step; mend the model or the batches first")
        spread = max(abs(start - mean) for start in starts)
        now = evaluate(0)
        for i, lr in enumerate(lrs.tolist()):
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].detach().fill_(lr * ratio)
                else:
                    group["lr"] = lr * ratio
            optimizer.zero_grad()
            now.backward()
            optimizer.step()
            now = evaluate(i + 1)
            losses[i] = float(now.detach()) - starts[(i + 1) % len(held)] + mean
            if _exploded(losses[: i + 1], mean, spread):
                losses[i:] = math.inf if math.isfinite(losses[i]) else math.nan
                break
    return suggest(lrs, losses)


def _ratios(optimizer: Optimizer) -> list[float]:
    """The rates of the groups over the largest; in a warm-up from 0, of those that it warms up to."""
    for key in ("lr", "initial_lr"):
        rates = [float(group.get(key, 0.0)) for group in optimizer.param_groups]
        if max(rates) > 0:
            return [rate / max(rates) for rate in rates]
    return [1.0] * len(rates)


def _exploded(losses: Tensor, mean: float, spread: float) -> bool:
    """Whether the last loss lies above the start by more than any noise, difference of batches and fall would explain.

    A constant added to the loss makes no difference.
    """
    last = float(losses[-1])
    if not math.isfinite(last):
        return True
    if len(losses) < 6:
        return False
    scale = max(spread, mean - float(losses.min()), STANDS_OUT * _noise(losses[:-1]))
    return last - mean > STOP * scale


@contextmanager
def _everything_restored(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Put a model, an optimizer and the random number generators back as they were, in the same objects."""
    parameters = {*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])}
    grads = {p: p.grad for p in parameters}
    modes = {module: module.training for module in model.modules()}
    kept = _Contents()
    for value in (*parameters, *(module._buffers for module in model.modules()), vars(optimizer)):
        kept.keep(value)
    with random_numbers_kept(devices={p.device for p in parameters}):
        try:
            for p in parameters:
                p.grad = None  # the caller's gradients must not be accumulated into
            yield
        finally:
            kept.restore()
            for p, grad in grads.items():
                p.grad = grad
            for module, mode in modes.items():
                module.training = mode


class _Contents:
    """What is in tensors, generators and containers of them, to be put back into the same objects."""

    def __init__(self) -> None:
        self._undo: dict[int, Callable[[], object]] = {}  # closures keep the objects alive, and so their ids

    def keep(self, value: Any) -> None:
        """Note the contents of a value, and of what is in it."""
        if id(value) in self._undo:
            return
        undo, inner = _put_back(value)
        if undo is not None:
            self._undo[id(value)] = undo
        for each in inner:
            self.keep(each)

    @torch.no_grad()
    def restore(self) -> None:
        for undo in self._undo.values():
            undo()


def _put_back(value: Any) -> tuple[Callable[[], object] | None, Iterable[Any]]:
    """What restores the contents of a value by itself, and the values in it."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        return lambda: value.copy_(copied), ()
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state), ()
    if isinstance(value, (dict, set)):
        items = value.copy()
        return lambda: (value.clear(), value.update(items)), items.values() if isinstance(items, dict) else ()
    if isinstance(value, (list, deque)):
        sequence = tuple(value)
        return lambda: (value.clear(), value.extend(sequence)), sequence
    return None, value if isinstance(value, tuple) else ()
