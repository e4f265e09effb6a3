"""x² as an autograd Function whose backward can be differentiated, or not, in the ways that occur in the wild."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class OnceSquare(Square):
    """autograd.grad takes its gradient for a constant, without a word."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class DetachedSquare(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * grad


class ComposableOnceSquare(torch.autograd.Function):
    """torch.func.hessian gives zeros, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class ComposableDetachedSquare(ComposableOnceSquare):
    """Nor does it bear a mark."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * grad


class RaisingSquare(Square):
    """Says so, as torch's own operations do."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no second derivative here")
        return 2 * ctx.saved_tensors[0] * grad


class AssertingSquare(Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert not torch.is_grad_enabled(), "no second derivative here"
        return 2 * ctx.saved_tensors[0] * grad


class OnceSoftmaxLoss(torch.autograd.Function):
    """Cross-entropy that computes its gradient by hand, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.nn.functional.cross_entropy(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        return grad * (x.softmax(1) - torch.nn.functional.one_hot(y, x.shape[1])) / len(x), None


class DetachedSoftmaxLoss(OnceSoftmaxLoss):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        return grad * (x.detach().softmax(1) - torch.nn.functional.one_hot(y, x.shape[1])) / len(x), None


MARKED = {f.__name__: f for f in (OnceSquare, ComposableOnceSquare)}
SILENT = {**MARKED, **{f.__name__: f for f in (DetachedSquare, ComposableDetachedSquare)}}
WITHOUT = {**SILENT, **{f.__name__: f for f in (RaisingSquare, AssertingSquare)}}
