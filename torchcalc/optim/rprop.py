"""Rprop: a step size for each weight, from the sign of its gradient alone.

Rule, for the gradient g (−g if maximize), the one before it g', with η⁻ < 1 < η⁺ and the limits of a step size:

    s ← s·η⁺ where g·g' > 0,   s·η⁻ where g·g' < 0                                (1)
    s ← min(max(s, smallest), largest)                                            (2)
    g ← 0 where g·g' < 0                                                          (3)
    p ← p − s·sign(g)                                                             (4)
    g' ← g                                                                        (5)

Why: while the sign stays, the way is long and the step may grow; where it changes, the last step jumped over a minimum and
was too long. (3) waits for one step there, and by (5) leaves the next one's size as it is. The size of g plays no part,
which is right for full batches, and wrong for small ones, whose signs are chance.

Reference: Riedmiller, Braun 1993, doi:10.1109/ICNN.1993.298623; (3) as in iRprop−, Igel, Hüsken 2000.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchcalc.optim.arguments import documented, takes_defaults
from torchcalc.optim.checks import check_at_least_zero, check_one_element
from torchcalc.optim.optimizer import Optimizer, ParamsT, to_scalar
from torchcalc.optim.tensor_list import Scalar, Vector, as_real

__all__ = ["Rprop"]


def rprop(
    p: Vector,
    g: Vector,
    previous: Vector,
    s: Vector,
    *,
    t: Scalar,
    eta_minus: float,
    eta_plus: float,
    smallest: float,
    largest: float,
) -> None:
    p, g, previous, s = as_real(p, g, previous, s)
    sign = g.mul(previous).sign()
    turned = sign.lt(0)
    factor = sign.masked_fill(sign.gt(0), eta_plus).masked_fill(turned, eta_minus).masked_fill(sign.eq(0), 1.0)
    s.mul_(factor).clamp_(smallest, largest)  # (1), (2)
    g = g.masked_fill(turned, 0.0)  # (3)
    p.addcmul_(g.sign(), s, value=-1)  # (4)
    previous.copy_(g)  # (5)


@documented
class Rprop(Optimizer):
    """Rprop (resilient backpropagation): a drop-in for ``torch.optim.Rprop``.

    Args:
        lr: the first step size of every weight, a finite number >= 0 or a 1-element tensor.
        etas: (η⁻, η⁺), 0 < η⁻ < 1 < η⁺: what a step size is multiplied by when the gradient's sign changes, and when it stays.
        step_sizes: the smallest and the largest step size, between which all are kept.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = Rprop([p], lr=0.25, etas=(0.5, 2.0))
    >>> for g in ([3.0, 3.0], [0.1, -0.1]):
    ...     p.grad = torch.tensor(g)
    ...     optimizer.step()
    >>> p.tolist()  # the first went on by twice the step; the second has jumped too far and waits
    [0.25, 0.75]
    """

    rule = staticmethod(rprop)
    variants: ClassVar = {}
    numbers = ("lr",)
    sparse_error = "Rprop does not support sparse gradients"

    @takes_defaults()
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ) -> None: ...

    def check(self, group: dict[str, Any]) -> None:
        check_one_element("lr", group["lr"])
        check_at_least_zero("learning rate", group["lr"])
        minus, plus = group["etas"]
        if not 0.0 < minus < 1.0 < plus:
            raise ValueError(f"Invalid eta values: {minus}, {plus}; 0 < the first < 1 < the second, e.g. (0.5, 1.2)")
        smallest, largest = group["step_sizes"]
        if not smallest <= largest:
            raise ValueError(f"Invalid step_sizes: {smallest}, {largest}; the smallest comes first")

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        (minus, plus), (smallest, largest) = group["etas"], group["step_sizes"]
        return {"eta_minus": minus, "eta_plus": plus, "smallest": smallest, "largest": largest}

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        return {"previous": "prev", "s": "step_size"}

    def new_slot(self, key: str, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        if key == "prev":
            return super().new_slot(key, p, g, group)
        lr = to_scalar(group["lr"])
        # A sum: full_like would read a tensor, and break the graph.
        return torch.zeros_like(g) + (lr * (1 + 1j) if p.is_complex() else lr)
