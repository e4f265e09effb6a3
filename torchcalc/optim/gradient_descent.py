"""Gradient descent, as the textbook tells it: compute the gradient, step against it, check that the loss decreased.

    new = old − lr·grad                                                           (1)

Why it works: to first order f(p − lr·g) = f(p) − lr·‖g‖² + O(lr²), so a small enough step along −g lowers f by lr·‖g‖².
Armijo's test (``armijo.py``) asks for a fraction c of that promise,

    f(p − lr·g) ≤ f(p) − c·lr·‖g‖²,                                               (2)

and backtracking multiplies lr by ``shrink`` until it holds, which for a differentiable f it does after finitely many
trials. All trials draw the random numbers of the first evaluation, torch's, Python's and NumPy's: otherwise dropout or
augmentation, and not the step, would decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchcalc.calculus.random_numbers import RandomNumbers
from torchcalc.optim.arguments import documented
from torchcalc.optim.armijo import change, enough
from torchcalc.optim.checks import check_at_least_zero, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT
from torchcalc.optim.tensor_list import Scalar, Vector, add_scaled_

__all__ = ["Descent", "GradientDescent"]


def gradient_descent(p: Vector, g: Vector, *, lr: Scalar) -> None:
    add_scaled_(p, g, -lr)  # (1)


class Descent(NamedTuple):
    """What a step with a closure did."""

    loss_before: float
    loss_after: float
    scale: float  #: the step was scale * lr; 0 if no trial was accepted and the parameters are where they were
    trials: int

    @property
    def decreased(self) -> bool:
        """Whether the loss is lower than before; False also where it is nan."""
        return self.loss_after < self.loss_before


@documented
class GradientDescent(Optimizer):
    """Plain gradient descent that checks its own step.

    With a closure, ``step`` evaluates the loss before and after, and ``optimizer.descent`` tells what happened
    (:class:`Descent`). Each evaluation is a call of the closure; like those of ``torch.optim.LBFGS`` it zeroes the
    gradients, computes the loss, calls backward, and returns the loss. Afterwards the random number generators (torch's,
    Python's, NumPy's) stand where one evaluation leaves them, and ``p.grad`` is the gradient at the last trial. Where the
    loss changes by less than its rounding, the gradients decide. Without a closure it only steps.

    Args:
        lr: step size, a finite number >= 0 or a 1-element tensor; with backtrack the largest that is tried.
        backtrack: shrink the step until Armijo's test (2) holds; needs a closure.
        shrink: the factor between trials, in (0, 1).
        armijo: c in (2), in (0, 1).
        max_trials: after so many the parameters are put back, and the step is given up.

    Raises:
        ValueError: an argument, also of a single group, out of range.
        RuntimeError: backtrack without a closure.

    If the closure raises, the parameters are put back first.

    >>> import torch
    >>> x = torch.nn.Parameter(torch.tensor(3.0))
    >>> optimizer = GradientDescent([x], lr=10.0, backtrack=True)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = x**2
    ...     loss.backward()
    ...     return loss
    >>> _ = optimizer.step(closure)  # 10 is far too long a step for x²
    >>> optimizer.descent.decreased, optimizer.descent.scale
    (True, 0.0625)
    """

    rule = staticmethod(gradient_descent)
    sparse_rule = staticmethod(gradient_descent)
    counts_steps: ClassVar[bool] = False
    whole = (*Optimizer.whole, "backtrack", "shrink", "armijo", "max_trials")
    descent: Descent | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        backtrack: bool = False,
        shrink: float = 0.5,
        armijo: float = 1e-4,
        max_trials: int = 30,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        for name, value in (("shrink", shrink), ("armijo", armijo)):
            if not 0 < value < 1:
                raise ValueError(f"Invalid {name} value: {value}; it must be in (0, 1)")
        if max_trials < 1:
            raise ValueError(f"Invalid max_trials value: {max_trials}; it must be at least 1")
        self.backtrack, self.shrink, self.armijo, self.max_trials = backtrack, shrink, armijo, max_trials
        super().__init__(params, {"lr": lr, "foreach": foreach, "maximize": maximize, "differentiable": False})

    def check(self, group: dict[str, Any]) -> None:
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"lr": group["lr"]}

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        return {}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; with a closure the loss is checked, and with backtrack the step shrunk until it decreases enough.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward, returns the loss.

        Returns:
            The loss before the step, or None without a closure.
        """
        if closure is None:
            if self.backtrack:
                raise RuntimeError("backtrack=True needs a closure that evaluates the loss: call step(closure)")
            return super().step()
        if self.backtrack and len({group["maximize"] for group in self.param_groups}) > 1:
            raise ValueError("backtrack=True needs one direction, but maximize differs between groups")
        start = RandomNumbers({p.device for group in self.param_groups for p in group["params"]})
        with torch.enable_grad():
            loss = closure()
        moves = [_Move(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        try:
            self.descent = self._try(moves, loss, closure, start)
        except BaseException:
            for move in moves:
                move.undo()
            raise
        return loss

    def _try(self, moves: list[_Move], loss: Any, closure: Callable[[], Any], start: RandomNumbers) -> Descent:
        """Shorter and shorter steps, until one is accepted or all are given up."""
        sign = -1 if self.param_groups[0]["maximize"] else 1
        before, eps = _number(loss), _eps(loss, moves)
        promise = sum(move.promise for move in moves)
        scale = 1.0
        for trial in range(1, self.max_trials + 1):
            for move in moves:
                move.make(scale)
            start.restore()
            with torch.enable_grad():
                after = _number(closure())
            slopes = lambda scale=scale: scale * (sum(move.slope() for move in moves) - promise) / 2  # noqa: E731
            fell = self.backtrack and enough(
                change(sign * before, sign * after, eps, slopes), scale * promise, self.armijo
            )
            if fell or not self.backtrack:
                return Descent(before, after, scale, trial)
            scale *= self.shrink
        for move in moves:
            move.undo()
        return Descent(before, before, 0.0, self.max_trials)


class _Move:
    """A parameter, where it was, and its way down: closures overwrite p.grad."""

    @torch.no_grad()
    def __init__(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        self.p, self.old, self.lr = p, p.clone(), float(group["lr"])
        self.sign = -1 if group["maximize"] else 1
        self.g = self.sign * p.grad
        self.promise = self.lr * float(_squared_norm(self.g))

    @torch.no_grad()
    def make(self, scale: float) -> None:
        self.p.copy_(self.old)
        gradient_descent(self.p, self.g, lr=scale * self.lr)

    @torch.no_grad()
    def undo(self) -> None:
        self.p.copy_(self.old)

    @torch.no_grad()
    def slope(self) -> float:
        """The share of φ'(scale): along this move, with the gradient that the closure has left."""
        if self.p.grad is None:
            return 0.0
        g, now = self.g.to_dense(), self.sign * self.p.grad.to_dense()
        return -self.lr * float((g.conj() * now).real.sum(dtype=torch.float64))


def _number(loss: Any) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)


def _squared_norm(g: Tensor) -> Tensor:
    values = g.coalesce().values() if g.is_sparse else g
    return (values.abs() ** 2).sum(dtype=torch.float64)


def _eps(loss: Any, moves: list[_Move]) -> float:
    """The unit of rounding of a loss; of a number, that of the coarsest parameter."""
    if isinstance(loss, Tensor):
        return torch.finfo(loss.dtype).eps if loss.is_floating_point() else 0.0
    return max((torch.finfo(move.p.dtype).eps for move in moves), default=0.0)
