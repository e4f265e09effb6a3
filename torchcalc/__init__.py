"""torchcalc: the calculus of learning, as PyTorch parts.

Every derivative is derived by hand in the file that computes it, and proven by machine in the test beside it.

>>> import torch, torchcalc
>>> x = torch.tensor(3.0, requires_grad=True)
>>> torchcalc.functional.square(x).backward()  # f(x) = x², f'(x) = 2x
>>> x.grad
tensor(6.)
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from torchcalc import autograd, calculus, convergence, functional, nn, optim

if TYPE_CHECKING:
    from torchcalc import instruments as instruments
    from torchcalc import testing

__version__ = "0.1.0"

# `instruments` needs Lightning: were it here, `from torchcalc import *` would need it too.
__all__ = ["__version__", "autograd", "calculus", "convergence", "functional", "nn", "optim", "testing"]

_LAZY = ("instruments", "testing")  # imported when first asked for: a training script seldom needs them


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return import_module(f"torchcalc.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
