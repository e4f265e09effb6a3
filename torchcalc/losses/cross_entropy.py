"""Cross-entropy of logits:  ℓ = -Σ_c q_c·log p_c,  p = softmax(x),  q the distribution that p should be.

Where p - y comes from.  log p_c = x_c - lse with the log-sum-exp lse = log Σ_k e^(x_k), so

    ℓ = lse·Σ_c q_c - Σ_c q_c·x_c.                                                (1)

The second term is linear in x, with the slope -q. The first has the slope of lse, which is the softmax itself,

    ∂lse/∂x_c = e^(x_c) / Σ_k e^(x_k) = p_c,                                      (2)

and together

    ∂ℓ/∂x = p·Σ_c q_c - q.                                                        (3)

For a target of class y, q = e_y is one-hot, Σq = 1, and (3) is p - y: prediction minus truth. Raise what should have
been said, by as much as was missing; lower everything else, by as much as was said. Softmax and logarithm cancel, so
there is no flat region: a confident error has a gradient near 1.

Every target is one q.  With class weights w, label smoothing ε over C classes, and t the one-hot class or the given
class probabilities,

    q = w·u,   u = (1 - ε)·t + ε/C,                                               (4)
    ∂ℓ/∂t = -(1 - ε)·w·log p,                                                     (5)
    ∂ℓ/∂w = -u·log p.                                                             (6)

For classes q is kept as two parts, q = smooth + hard·e_y with smooth = w·ε/C, the same for every sample, and hard =
(1 - ε)·w_y; for probabilities q is all smooth. A sample of class ignore_index has q = 0. The loss is L = Σ_n ℓ_n / N: N
= 1 under sum; under mean N counts the samples, or for classes N = Σ_n w_(y_n) over those not ignored.

On request ζ·lse² is added to each sample's loss (z-loss), which keeps Σ e^x near 1; by (2) its slope is

    ∂(ζ·lse²)/∂x = 2ζ·lse·p;                                                      (7)

the logits are capped first (activations/softcap.py); each sample counts u_n times, in the loss and in N; N is given.

Saves its arguments, which are alive anyway, and where a kernel computes it two or three numbers for each sample: its largest
logit m, log Σ_k e^(x_k - m), and Σq where that differs; from these p is computed anew in backward. torch keeps log p from
forward, a tensor of the size of x. float16 and bfloat16 are computed in float32, of which nothing is kept either. A kernel
reads the logits once forward and once backward (native/csrc/rows.cpp on CPU, native/row_kernels.py on a GPU); what follows
are the same formulas as operations on tensors.

Reference: Bridle 1990, "Training stochastic model recognition algorithms as networks", NeurIPS 2. Label smoothing:
Szegedy et al. 2016, arXiv:1512.00567. z-loss: Chowdhery et al. 2022, "PaLM", arXiv:2204.02311.
"""

import math
from functools import reduce as fold
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack

from torchcalc import native
from torchcalc.activations.softcap import softcap as cap
from torchcalc.autograd import Function
from torchcalc.formula.launch import fits
from torchcalc.formula.launched import is_observed
from torchcalc.losses.reduction import resolve
from torchcalc.native import pointwise as kernels
from torchcalc.native import row_kernels
from torchcalc.native.gpu import INTERPRETED
from torchcalc.promotion import autocasts, like, unbroadcast, widen
from torchcalc.tracing import NotScripted, leaf

__all__ = ["CrossEntropyLoss", "cross_entropy"]


BY_ROW = row_kernels.BY_ROW


class Distribution(NamedTuple):
    """q = smooth + hard·e_classes; the parts have the dimensions of the logits, of size 1 where they are constant."""

    smooth: Tensor | float
    hard: Tensor | float
    classes: Tensor | None  # class of each sample, 0 for an ignored one; None for class probabilities
    counts: Tensor  # 1 for each sample, 0 for an ignored one


def distribution(x: Tensor, target: Tensor, w: Tensor | None, ignore_index: int, smoothing: float) -> Distribution:
    """q of equation (4); u if there are no class weights."""
    weight = 1 if w is None else column(w, x)
    uniform = smoothing / max(x.shape[class_dim(x)], 1)
    if target.is_floating_point():
        t = widen(target)
        return Distribution(weight * ((1 - smoothing) * t + uniform if smoothing else t), 0.0, None, t.new_ones(()))
    y = target.reshape(of_one_class(x))
    counts = y != ignore_index
    index = torch.where(counts, y, 0)
    hard = (1 - smoothing) * (1 if w is None else each(w, index))
    return Distribution(uniform * weight, hard, index, counts.to(widen(x).dtype))


def class_dim(x: Tensor) -> int:
    return 0 if x.dim() == 1 else 1


def column(w: Tensor, x: Tensor) -> Tensor:
    """The class weights in the shape that broadcasts against the logits."""
    return widen(w).view([-1 if i == class_dim(x) else 1 for i in range(x.dim())])


def each(w: Tensor, classes: Tensor) -> Tensor:
    """w_y of each sample."""
    return widen(w).gather(0, classes.reshape(-1)).view(classes.shape)


def normalizer(x: Tensor, target: Tensor, w: Tensor | None, ignore_index: int, reduction: str) -> Tensor | int:
    """N; where all targets are ignored it is 1, for torch's 0/0 = NaN would end a training."""
    if reduction != "mean":
        return 1
    if target.is_floating_point():
        return x.numel() // max(x.shape[class_dim(x)], 1)
    counts = target != ignore_index
    samples = counts.sum()
    n = samples if w is None else (each(w, torch.where(counts, target, 0)) * counts).sum()
    return torch.where(samples == 0, 1, n) if target.numel() else n


def of_one_class(x: Tensor) -> list[int]:
    """The shape of x with one class."""
    return [1 if i == class_dim(x) else size for i, size in enumerate(x.shape)]


def slope_x(x: Tensor, q: Distribution, r: Tensor, z_loss: float) -> Tensor:
    """r·∂ℓ/∂x, where r is each sample's share ∂L/∂ℓ, 0 for an ignored one."""
    dim = class_dim(x)
    p = torch.softmax(widen(x), dim)  # (2)
    total = q.hard + (q.smooth.sum(dim, keepdim=True) if isinstance(q.smooth, Tensor) else q.smooth * x.shape[dim])
    if z_loss:
        total = total + 2 * z_loss * torch.logsumexp(widen(x), dim, keepdim=True)  # (7)
    grad = p * (r * total)
    if not torch.is_grad_enabled() and is_plain(p):  # in place: it is as large as the logits
        if isinstance(q.smooth, Tensor) or q.smooth:
            grad.sub_(r * q.smooth)
        if q.classes is not None:
            grad.scatter_add_(dim, q.classes, -r * q.hard)  # (3)
            if not (x.is_cpu and q.counts.all()):
                grad.masked_fill_(q.counts == 0, 0)  # also where an ignored sample's logits are infinite or NaN
        return grad
    if isinstance(q.smooth, Tensor) or q.smooth:
        grad = grad - r * q.smooth
    if q.classes is None:
        return grad
    # A comparison is part of a loop that a compiler fuses, and a scatter ends it.
    here = (
        torch.arange(x.shape[dim], device=x.device).view([-1 if i == dim else 1 for i in range(x.dim())]) == q.classes
    )
    return torch.where(q.counts != 0, grad - torch.where(here, r * q.hard, 0), 0)  # (3)


def is_plain(x: Tensor) -> bool:
    """Whether nothing traces or transforms x."""
    return type(x) is Tensor and not _are_functorch_transforms_active() and not _len_torch_dispatch_stack()


def careful(x: Tensor, q: Distribution) -> Tensor:
    """(1) of each sample, where 0·∞ = 0: an impossible class that is not asked for costs nothing."""
    dim = class_dim(x)
    z = torch.log_softmax(widen(x), dim)
    ell = torch.zeros((), dtype=z.dtype, device=z.device)
    if isinstance(q.smooth, Tensor) or q.smooth:
        smooth = torch.as_tensor(q.smooth, dtype=z.dtype, device=z.device)
        ell = ell - torch.where(smooth == 0, 0, smooth * z).sum(dim, keepdim=True)
    if q.classes is not None:
        hard = torch.as_tensor(q.hard, dtype=z.dtype, device=z.device)
        ell = ell - torch.where(hard == 0, 0, hard * z.gather(dim, q.classes))
        ell = torch.where(q.counts != 0, ell, 0)
    return ell.squeeze(dim)


def slope_t(x: Tensor, w: Tensor | None, smoothing: float) -> Tensor:
    return (smoothing - 1) * (1 if w is None else column(w, x)) * torch.log_softmax(widen(x), class_dim(x))  # (5)


def slope_w(x: Tensor, u: Distribution) -> Tensor:
    return -u.smooth * torch.log_softmax(widen(x), class_dim(x))  # (6), for probabilities


def gradients(
    grad_output: Tensor,
    x: Tensor,
    target: Tensor,
    w: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    z_loss: float = 0.0,
    needed: tuple[bool, ...] = (True, False, False),
) -> tuple[Any, ...]:
    """∂L/∂x, ∂L/∂t, ∂L/∂w, times what comes in; None for what is not needed. By operations that have derivatives."""
    need_x, need_t, need_w = needed
    q = distribution(x, target, w, ignore_index, smoothing)
    g = widen(grad_output) / normalizer(x, target, w, ignore_index, reduction)
    if reduction in BY_ROW:
        g = g.reshape(of_one_class(x))
    r = g * q.counts
    grad_w = None
    if need_w and w is not None:
        u = distribution(x, target, None, ignore_index, smoothing)
        grad_w = unbroadcast(r * slope_w(x, u), column(w, x)).to(w.dtype).view(w.shape)
    return (
        like(slope_x(x, q, r, z_loss), x) if need_x else None,
        like(r * slope_t(x, w, smoothing), target) if need_t else None,
        grad_w,
    )


class CrossEntropyFunction(Function):
    autocast = "float32"

    @staticmethod
    def forward(
        x: Tensor,
        target: Tensor,
        w: Tensor | None,
        ignore_index: int,
        reduction: str,
        smoothing: float,
        z_loss: float,
        *,
        needs_input_grad: tuple[bool, ...],
    ) -> Tensor:
        probabilities = target.is_floating_point()
        if needs_input_grad[2] and not probabilities:
            raise RuntimeError(
                "The function 'nll_loss_forward' is not differentiable with respect to argument 'weight'. "
                "This input cannot have requires_grad True. Use weight.detach(), or class probabilities as target."
            )
        t = widen(target) if probabilities else target
        summed = "sum" if reduction in ("mean", "sum") and not z_loss else "none"
        loss = F.cross_entropy(
            widen(x), t, widen(w), ignore_index=ignore_index, reduction=summed, label_smoothing=smoothing
        )
        if (probabilities or smoothing) and (not (loss.is_cpu and is_plain(loss)) or loss.isnan().any()):
            loss = careful(x, distribution(x, target, w, ignore_index, smoothing))
            loss = loss.sum() if summed == "sum" else loss
        if z_loss:
            added = z_loss * torch.logsumexp(widen(x), class_dim(x)).square()
            loss = loss + (added if probabilities else torch.where(target != ignore_index, added, 0))
            loss = loss if reduction in BY_ROW else loss.sum()
        if reduction == "mean":
            loss = loss / normalizer(x, target, w, ignore_index, reduction)
        return loss.to(_result_dtype(x, target, w, reduction))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, target, w, *ctx.options = inputs
        ctx.save_for_backward(x, target, w)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, target, w = ctx.saved_tensors
        ignore_index, reduction, smoothing, z_loss = ctx.options
        needed = ctx.needs_input_grad[:3]
        found = gradients(grad_output, x, target, w, ignore_index, reduction, smoothing, z_loss, needed)
        return *found, *(None for _ in ctx.options)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dt: Tensor | None, dw: Tensor | None, *_: None) -> Tensor:
        x, target, w = ctx.saved_tensors
        ignore_index, reduction, smoothing, z_loss = ctx.options
        q = distribution(x, target, w, ignore_index, smoothing)
        change = slope_x(x, q, q.counts, z_loss) * dx
        if dt is not None:
            change = change + slope_t(x, w, smoothing) * dt
            if dw is not None:
                change = change + slope_w(x, distribution(x, target, None, ignore_index, smoothing)) * column(dw, x)
        losses = change.sum(class_dim(x)) if reduction in BY_ROW else change.sum()
        losses = losses / normalizer(x, target, w, ignore_index, reduction)
        return losses.to(_result_dtype(x, target, w, reduction))


class LaunchedCrossEntropyFunction(torch.autograd.Function):
    """The same by kernels on a GPU, as bare as can be: (rows, classes) or (N, C, *), and the class of each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, w: Tensor | None, *options: Any) -> Tensor:
        loss, ctx.kept = row_kernels.cross_entropy(x, target, w, *options)
        ctx.save_for_backward(x, target, w)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, target, w = ctx.saved_tensors
        if torch.is_grad_enabled() or not fits([g]):
            grad, *_ = gradients(g, x, target, w, *ctx.options)
        else:
            grad = row_kernels.cross_entropy_gradient(g, x, target, w, ctx.kept, *ctx.options)
        return grad, None, None, *(None for _ in ctx.options)


def _launched(
    x: Tensor,
    target: Tensor,
    w: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    z_loss: float = 0.0,
) -> Tensor | None:
    """The loss by kernels on a GPU; None where they do not take the arguments."""
    if (
        x.dim() > 2
        and not x.is_contiguous()
        and x.movedim(1, -1).is_contiguous()
        and target.shape == x.shape[:1] + x.shape[2:]
    ):
        flat = x.movedim(1, -1).reshape(-1, x.shape[1])  # channels last: the classes of a sample lie side by side
        found = _launched(flat, target.reshape(-1), w, ignore_index, reduction, smoothing, z_loss)
        return found.view(target.shape) if found is not None and found.dim() else found
    if (
        not (x.is_cuda or INTERPRETED)
        or reduction not in kernels.ROW_REDUCTIONS
        or not 0 <= smoothing <= 1
        or not row_kernels.takes(x, target, w)
        or is_observed()
        or type(target) is not Tensor
        or not fits([x if x.is_contiguous() else x[0]])
        or (w is not None and (not fits([w]) or (w.requires_grad and torch.is_grad_enabled())))
    ):
        return None
    if x.is_cuda and x.dim() == 2:
        row_kernels.enter(x, target, w, ignore_index, reduction, smoothing)
    loss: Tensor = LaunchedCrossEntropyFunction.apply(x, target, w, ignore_index, reduction, smoothing, z_loss)
    return loss


def _result_dtype(x: Tensor, target: Tensor, w: Tensor | None, reduction: str) -> torch.dtype:
    dtype = x.dtype
    if target.is_floating_point():
        dtype = fold(torch.promote_types, (a.dtype for a in (x, target, w) if a is not None))
    return torch.promote_types(dtype, torch.float32) if reduction == "wide" else dtype


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    z_loss: float,
) -> Tensor:
    if not torch.compiler.is_compiling() and isinstance(input, Tensor):
        halves = input.dtype in (torch.bfloat16, torch.float16)
        arguments = (widen(input), target, widen(weight)) if halves and autocasts(input) else (input, target, weight)
        loss: Tensor | None = None
        if (rows := kernels.rows()) is not None:
            code = kernels.ROW_REDUCTIONS.get(reduction, -1)
            loss = rows.cross_entropy(*arguments, ignore_index, code, smoothing, z_loss)
        if loss is None:
            loss = _launched(*arguments, ignore_index, reduction, smoothing, z_loss)
        if loss is not None:
            return loss
        if rows is None:
            native.warn_once((input,), nodes=True)
    return CrossEntropyFunction.apply(input, target, weight, ignore_index, reduction, smoothing, z_loss)


@leaf
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The cross-entropy of softmax(input), as ``torch.nn.functional.cross_entropy``.

    Args:
        input: logits ``(N, C, *)`` or ``(C,)``, of float dtype, C the classes, ``*`` any number of dimensions.
        target: classes ``(N, *)`` or ``()``, int64 or uint8, 0 ≤ class < C or ``ignore_index``; or probabilities of the
            shape of input, of float dtype, which get a gradient too if they need one.
        weight: weights of the classes ``(C,)``, ≥ 0, of the dtype of input; a mean over classes is then over the sum of
            the weights of the targets. It may need a gradient if target is probabilities.
        size_average: deprecated, as in torch.
        ignore_index: the target that contributes nothing; < 0 if target is probabilities.
        reduce: deprecated, as in torch.
        reduction: ``"none"`` for the losses of the samples, ``"sum"``, or ``"mean"``.
        label_smoothing: part ε of each target that is spread evenly over the classes, ≤ 1; torch takes a negative one
            as 0.
        z_loss: ζ ≥ 0: adds ζ·(log Σ e^x)² to the loss of each sample; 1e-4 is usual.
        softcap: c > 0: the logits are c·tanh(input/c).
        token_weight: how often each sample counts, ``(N, *)`` or ``()``, of float dtype; a mean is over their sum. It gets a
            gradient if it needs one.
        normalizer: what the sum is divided by under ``"mean"``, > 0, a number or a tensor of one: the tokens of all k
            micro-batches, say, whose losses then add up to that of the whole batch.

    Returns:
        0-d tensor, or for ``"none"`` one of shape ``(N, *)`` or ``()``.

    Raises:
        IndexError: if a target is not a class (on a CPU; CUDA asserts on the device).
        ValueError: if ``reduction`` is unknown, the batch sizes differ, or an argument is out of its range.
        RuntimeError: if other shapes or dtypes do not fit, label_smoothing > 1, or ``weight`` needs a gradient while
            target is classes.

    Differs from torch: if all targets are ignored, the mean is 0 and so is its gradient, where torch's mean is NaN.
    float16 and bfloat16 are computed in float32 and rounded once.

    Reference: Bridle 1990, NeurIPS 2; label smoothing: Szegedy et al. 2016, arXiv:1512.00567; z-loss: Chowdhery et al. 2022,
    arXiv:2204.02311.

    >>> logits = torch.tensor([[0.8, 0.1, 0.1]]).log().requires_grad_()
    >>> loss = cross_entropy(logits, torch.tensor([0]))  # said 0.8 of what is true
    >>> loss.backward()
    >>> print(f"{loss.item():.2f}", logits.grad)  # p - y
    0.22 tensor([[-0.2000,  0.1000,  0.1000]])
    >>> print(f"{cross_entropy(logits, torch.tensor([1])).item():.2f}")  # said 0.1 of what is true
    2.30
    """
    reduction = resolve(reduction, size_average, reduce)
    if reduction not in kernels.REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction: 'none', 'mean' or 'sum'")
    if target.dtype == torch.uint8:
        target = target.long()  # torch's own transforms have no uint8 index
    smoothing, z_loss = max(float(label_smoothing), 0.0), float(z_loss)
    if softcap is not None:
        input = cap(input, softcap)
    if z_loss != 0:
        check_z_loss(z_loss)
    if token_weight is None and normalizer is None:
        return _cross_entropy(input, target, weight, ignore_index, reduction, smoothing, z_loss)
    check_normalizer(normalizer, reduction)
    losses = _cross_entropy(input, target, weight, ignore_index, "wide", smoothing, z_loss)
    total = reduced(losses, input, target, weight, ignore_index, reduction, token_weight, normalizer)
    return total.to(_result_dtype(input, target, weight, reduction))


def check_z_loss(z_loss: float) -> None:
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss}: the factor of (log Σ e^x)², >= 0 and finite, e.g. 1e-4")


def check_normalizer(n: float | Tensor | None, reduction: str) -> None:
    if n is None:
        return
    if reduction != "mean":
        raise ValueError(
            f'normalizer={n} is what a mean divides by, and reduction is {reduction!r}: pass reduction="mean"'
        )
    if n.numel() != 1 if isinstance(n, Tensor) else not n > 0:
        raise ValueError(f"normalizer={n}: one number > 0, e.g. the tokens of the whole batch")


def shares(
    x: Tensor,
    target: Tensor,
    w: Tensor | None,
    ignore_index: int,
    reduction: str,
    token_weight: Tensor | None,
    n: float | Tensor | None,
) -> tuple[Tensor | None, Any]:
    """u of each sample, None for 1; and N."""
    u = None
    if token_weight is not None:
        samples = x.narrow(class_dim(x), 0, 1).squeeze(class_dim(x)).shape
        if token_weight.shape != samples:
            raise ValueError(
                f"token_weight of shape {tuple(token_weight.shape)}: one weight for each sample, {tuple(samples)}"
            )
        u = widen(token_weight)
    if n is not None or reduction != "mean":
        return u, 1 if n is None else n.reshape(()) if isinstance(n, Tensor) else n
    if u is None or not target.numel():
        return u, normalizer(x, target, w, ignore_index, reduction)
    if target.is_floating_point():
        counted = u
    else:
        counts = target != ignore_index
        counted = torch.where(counts, u if w is None else u * each(w, torch.where(counts, target, 0)), 0)
    total = counted.sum()
    return u, torch.where(total == 0, 1, total)


def reduced(losses: Tensor, *arguments: Any) -> Tensor:
    """Σ u·ℓ/N, or each u·ℓ."""
    reduction = arguments[4]
    u, n = shares(*arguments)
    losses = losses if u is None else losses * u
    return losses if reduction == "none" else losses.sum() / n


class CrossEntropyLoss(NotScripted, nn.CrossEntropyLoss):
    """Module of :func:`cross_entropy`, as ``torch.nn.CrossEntropyLoss``.

    >>> CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        """Args: those of :func:`cross_entropy`."""
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap = z_loss, softcap

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """Apply :func:`cross_entropy`; ``(N, C, *)`` against ``(N, *)``."""
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            token_weight=token_weight,
            normalizer=normalizer,
        )
