"""Feed-forward blocks:  y = W₂·h + b₂  with  h = φ(a),  a = W₁·x + b₁,  and gated ones,  h = φ(a)∘b,  b = Wᵤ·x + bᵤ.

Derivation.  Rows of X, A, B, H, Y are samples. With G = ∂L/∂Y, the second layer gives (linear.py)

    ∂L/∂W₂ = Gᵀ·H,   ∂L/∂b₂ = Σₙ G_n,   ∂L/∂H = G·W₂,                             (1)

what lies between is elementwise (glu.py and the activations' files),

    ∂L/∂A = ∂L/∂H∘φ'(A)∘B,   ∂L/∂B = ∂L/∂H∘φ(A),   where without a gate B = 1,    (2)

and the first layers, which share X, give

    ∂L/∂W₁ = (∂L/∂A)ᵀ·X,   ∂L/∂Wᵤ = (∂L/∂B)ᵀ·X,   ∂L/∂X = ∂L/∂A·W₁ + ∂L/∂B·Wᵤ.   (3)

In forward mode the same three steps lead from ẋ, Ẇ and ḃ to Ȧ and Ḃ, to Ḣ, and to Ẏ = Ḣ·W₂ᵀ + H·Ẇ₂ᵀ + ḃ₂.       (4)

Saves X, the weights, A and B. Of the operations autograd would keep four tensors of the hidden size, A, φ(A), B and H (without a
gate A and H); from A and B one pass computes (2) and H. With ``recompute`` A and B are not kept either, but computed from X
again, for one more product each.

A and B are outputs of the Function, so their own derivatives are those of the first layers: second derivatives find their way.

Reference: Shazeer 2020, "GLU variants improve transformer", arXiv:2002.05202.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc import native
from torchcalc.activations import gelu, relu, sigmoid, silu, tanh
from torchcalc.activations.glu import geglu, reglu, swiglu  # noqa: F401  which define the gates
from torchcalc.autograd import Function
from torchcalc.casts import lowered
from torchcalc.formula.launch import PLAIN
from torchcalc.formula.launched import enter, is_observed, whole_kernels
from torchcalc.formula.pointwise import FORMULAS, Formula, change
from torchcalc.formula.pointwise import gradients as gradients_of
from torchcalc.layers.linear import Linear, linear, samples
from torchcalc.native import gpu
from torchcalc.native import pointwise as kernels
from torchcalc.promotion import autocasts, unbroadcast
from torchcalc.tracing import NotScripted, leaf

__all__ = ["MLP", "GatedMLP", "gated_mlp", "mlp"]

#: Activation to the names of φ(a) and of φ(a)∘b among the formulas; None where there is no such gate.
ACTIVATIONS: dict[str, tuple[str, str | None]] = {
    "gelu": ("GELU", "GEGLU"),
    "gelu_tanh": ("GELUTanh", "GEGLUTanh"),
    "relu": ("ReLU", "ReGLU"),
    "sigmoid": ("Sigmoid", None),
    "silu": ("SiLU", "SwiGLU"),
    "tanh": ("Tanh", None),
}
Parts = Sequence[Tensor | None]  # weight and bias, those of the gated layer (None), and those of the second layer


def hidden_of(x: Tensor, parts: Parts) -> list[Tensor]:
    """A, and B where there is a gate."""
    w, b, w_up, b_up, *_ = parts
    assert w is not None
    return [linear(x, w, b)] + ([] if w_up is None else [linear(x, w_up, b_up)])


def gradients(
    formula: Formula,
    g: Tensor,
    along: Sequence[Tensor | None],
    x: Tensor,
    parts: Parts,
    hidden: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """∂L/∂x and those of the six parts; None for what is not needed. along: what comes back to A and B by other ways."""
    w, b, w_up, b_up, w_down, b_down = parts
    need_x, *need_first, need_down, need_last = needed
    assert w is not None and w_down is not None
    grads: list[Tensor | None] = [None] * 7
    if need_last:
        grads[6] = unbroadcast(g, b_down) if b_down is not None else None  # (1)
    h = formula.on_tensors(*hidden)
    if need_down:
        grads[5] = samples(g).mT @ samples(h)  # (1)
    if not (need_x or any(need_first)):
        return grads
    known = {**dict(zip(formula.inputs, hidden, strict=True)), "y": h}
    known = {name: a for name, a in known.items() if name in formula.saved}
    like = [(a.shape, a.dtype) for a in hidden]
    found = gradients_of(formula, g @ w_down, known, [True] * len(hidden), like)  # (1), (2)
    back = [a if more is None else a + more for a, more in zip(found, along, strict=True) if a is not None]
    for i, (of_hidden, (weight, bias)) in enumerate(zip(back, ((w, b), (w_up, b_up)), strict=False)):
        assert weight is not None
        if needed[1 + 2 * i]:
            grads[1 + 2 * i] = samples(of_hidden).mT @ samples(x)  # (3)
        if needed[2 + 2 * i] and bias is not None:
            grads[2 + 2 * i] = unbroadcast(of_hidden, bias)
        if need_x:
            part = of_hidden @ weight
            grads[0] = part if grads[0] is None else grads[0] + part
    return grads


class MLPFunction(Function):
    autocast = "lower_precision"

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, b: Tensor | None, w_up: Tensor | None, b_up: Tensor | None, w_down: Tensor,
        b_down: Tensor | None, name: str, recompute: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        hidden = hidden_of(x, (w, b, w_up, b_up))
        y = linear(FORMULAS[name].on_tensors(*hidden), w_down, b_down)
        return (y,) if recompute else (y, *hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.name, ctx.recompute = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, *along: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        parts, hidden = rest[:6], rest[6:]
        if ctx.recompute:
            hidden = hidden_of(x, parts)
            along = (None,) * len(hidden)  # type: ignore[assignment]
        needed = ctx.needs_input_grad[:7]
        return *gradients(FORMULAS[ctx.name], g, along, x, parts, hidden, needed), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, *tangents: Any) -> tuple[Tensor, ...]:
        x, *rest = ctx.saved_tensors
        parts, formula = rest[:6], FORMULAS[ctx.name]
        hidden = rest[6:] or hidden_of(x, parts)
        changes = [
            linear_change(dx, tangents[2 * i], tangents[2 * i + 1], x, parts[2 * i], a) for i, a in enumerate(hidden)
        ]
        h = formula.on_tensors(*hidden)
        known = {**dict(zip(formula.inputs, hidden, strict=True)), "y": h}
        dh = change(formula, changes, [known[name] for name in formula.saved], ()).to(h.dtype)
        y = linear_change(dh, tangents[4], tangents[5], h, parts[4], None)
        return (y,) if ctx.recompute else (y, *changes)


def linear_change(
    dx: Tensor | None, dw: Tensor | None, db: Tensor | None, x: Tensor, w: Tensor, like: Tensor | None
) -> Tensor:
    """Of x·wᵀ + b; zeros where nothing changes."""
    terms = [] if dx is None else [dx @ w.mT]
    terms += [] if dw is None else [x @ dw.mT]
    terms += [] if db is None else [db]
    if not terms:
        assert like is not None
        return torch.zeros_like(like)
    dy = functools.reduce(torch.add, terms)
    return dy.expand(*x.shape[:-1], len(w))


def block(x: Tensor, parts: Parts, name: str, recompute: bool) -> Tensor:
    """The block by the nodes' kernels, or by the Function."""
    given: list[Any] = [x, *parts]
    if not torch.compiler.is_compiling():
        formula = FORMULAS[name]
        if (rows := kernels.rows()) is None:
            native.warn_once((x,), nodes=True)
        elif (place := kernels.index(formula)) >= 0:
            if autocasts(x):
                given = lowered(given, x.device.type)
            if gpu.takes(x.device) and type(x) in PLAIN and not is_observed():
                enter(formula, given[0], (), whole_kernels)
            found: Tensor | None = rows.mlp(place, *given, recompute)
            if found is not None:
                return found
    y: Tensor = MLPFunction.apply(x, *parts, name, recompute)[0]
    return y


def formula_of(activation: str, gated: bool) -> str:
    names = [known for known, (_, gate) in ACTIVATIONS.items() if gate or not gated]
    if activation not in names:
        raise ValueError(f"activation={activation!r} is not known; use one of {', '.join(map(repr, names))}")
    plain, gate = ACTIVATIONS[activation]
    name = gate if gated else plain
    assert name is not None
    return name


def check_shapes(x: Tensor, **weights: Tensor | None) -> None:
    """Refuse weights that do not fit together: the first ones (H, D), the last (O, H), biases (H) or (O)."""
    first, last = next(iter(weights.values())), weights.get("weight2", weights.get("down_weight"))
    assert first is not None and last is not None
    size = x.shape[-1] if x.dim() else None
    for name, w in weights.items():
        if w is None:
            continue
        if "bias" in name:
            wanted: tuple[Any, ...] = last.shape[:1] if name in ("bias2", "down_bias") else first.shape[:1]
        else:
            wanted = (last.shape[0] if last.dim() else None, first.shape[0]) if w is last else (*first.shape[:1], size)
        if tuple(w.shape) != tuple(wanted):
            raise RuntimeError(
                f"{name} has shape {tuple(w.shape)}; with input of shape {tuple(x.shape)} and "
                f"{next(iter(weights))} of shape {tuple(first.shape)} give one of shape {tuple(wanted)}"
            )


@leaf
def mlp(
    input: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
) -> Tensor:
    """linear(φ(linear(input, weight1, bias1)), weight2, bias2), which keeps less for backward.

    Args:
        input: ``(*, D)``, of float dtype.
        weight1: ``(H, D)``, of the same dtype, as are the others.
        weight2: ``(O, H)``.
        bias1: ``(H)``, or None.
        bias2: ``(O)``, or None.
        activation: φ: ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"sigmoid"``, ``"silu"`` or ``"tanh"``.
        recompute: whether backward computes linear(input, weight1, bias1) again, so that nothing of size H is kept.

    Returns:
        ``(*, O)``.

    Raises:
        RuntimeError: if shapes do not fit.
        ValueError: if the activation is not known.

    Reference: the chain rule.

    >>> x, w = torch.tensor([1.0, -1.0]), torch.eye(2)
    >>> mlp(x, w, 2 * w, activation="relu")
    tensor([2., 0.])
    """
    check_shapes(input, weight1=weight1, bias1=bias1, weight2=weight2, bias2=bias2)
    return block(input, (weight1, bias1, None, None, weight2, bias2), formula_of(activation, False), recompute)


@leaf
def gated_mlp(
    input: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    recompute: bool = False,
) -> Tensor:
    """linear(φ(linear(input, gate_weight))·linear(input, up_weight), down_weight), and biases: keeps half of what autograd does.

    Args:
        input: ``(*, D)``, of float dtype.
        gate_weight: ``(H, D)``, of the same dtype, as are the others.
        up_weight: ``(H, D)``.
        down_weight: ``(O, H)``.
        gate_bias: ``(H)``, or None.
        up_bias: ``(H)``, or None.
        down_bias: ``(O)``, or None.
        activation: φ: ``"silu"`` for SwiGLU, ``"gelu"`` or ``"gelu_tanh"`` for GeGLU, ``"relu"`` for ReGLU.
        recompute: whether backward computes the two first products again, so that nothing of size H is kept.

    Returns:
        ``(*, O)``.

    Raises:
        RuntimeError: if shapes do not fit.
        ValueError: if the activation is not known.

    Reference: Shazeer 2020, arXiv:2002.05202.

    >>> x, w = torch.tensor([1.0, -1.0]), torch.eye(2)
    >>> gated_mlp(x, w, 3 * w, w, activation="relu")
    tensor([3., 0.])
    """
    check_shapes(
        input, gate_weight=gate_weight, up_weight=up_weight, gate_bias=gate_bias, up_bias=up_bias,
        down_weight=down_weight, down_bias=down_bias,
    )  # fmt: skip
    parts = gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias
    return block(input, parts, formula_of(activation, True), recompute)


_MODULES: dict[str, Any] = {
    "gelu": gelu.GELU,
    "gelu_tanh": functools.partial(gelu.GELU, approximate="tanh"),
    "relu": relu.ReLU,
    "sigmoid": sigmoid.Sigmoid,
    "silu": silu.SiLU,
    "tanh": tanh.Tanh,
}


class MLP(NotScripted, nn.Sequential):
    """Module of :func:`mlp`: ``nn.Sequential(nn.Linear, activation, nn.Linear)``, with its ``state_dict``.

    Args:
        in_features: D, the size of the last dimension of input.
        hidden_features: H, the size between the two layers.
        out_features: O, the size of the last dimension of the result; None is D.
        activation, recompute: of :func:`mlp`.
        bias: whether the layers have biases.
        device, dtype: of the parameters.

    >>> block = MLP(2, 8)
    >>> sorted(block.state_dict())
    ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        formula_of(activation, gated=False)
        out = in_features if out_features is None else out_features
        how: Any = {"bias": bias, "device": device, "dtype": dtype}
        super().__init__(
            Linear(in_features, hidden_features, **how), _MODULES[activation](), Linear(hidden_features, out, **how)
        )
        self.activation, self.recompute = activation, recompute

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`mlp` to ``(*, in_features)``."""
        first: Any = self[0]
        last: Any = self[2]
        return mlp(
            input,
            first.weight,
            last.weight,
            first.bias,
            last.bias,
            activation=self.activation,
            recompute=self.recompute,
        )


class GatedMLP(NotScripted, nn.Module):
    """Module of :func:`gated_mlp`, with the ``state_dict`` of most language models' own.

    Args:
        in_features: D, the size of the last dimension of input.
        hidden_features: H, the size between the two layers.
        out_features: O, the size of the last dimension of the result; None is D.
        activation, recompute: of :func:`gated_mlp`.
        bias: whether the layers have biases.
        device, dtype: of the parameters.

    >>> block = GatedMLP(2, 8)
    >>> list(block.state_dict()), block(torch.ones(3, 2)).shape
    (['gate_proj.weight', 'up_proj.weight', 'down_proj.weight'], torch.Size([3, 2]))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        activation: str = "silu",
        bias: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        formula_of(activation, gated=True)
        super().__init__()
        out = in_features if out_features is None else out_features
        how: Any = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = Linear(in_features, hidden_features, **how)
        self.up_proj = Linear(in_features, hidden_features, **how)
        self.down_proj = Linear(hidden_features, out, **how)
        self.activation, self.recompute = activation, recompute

    def extra_repr(self) -> str:
        """The activation; whether backward computes again."""
        return f"activation={self.activation!r}" + (", recompute=True" if self.recompute else "")

    def forward(self, input: Tensor) -> Tensor:
        """Apply :func:`gated_mlp` to ``(*, in_features)``."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return gated_mlp(
            input, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias,
            activation=self.activation, recompute=self.recompute,
        )  # fmt: skip
