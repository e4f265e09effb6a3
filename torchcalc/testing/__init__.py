"""Is my function, loss or optimizer right, and what is wrong? One call, one readable report.

>>> import torch
>>> import torchcalc.testing
>>> class Halved(torch.autograd.Function):
...     @staticmethod
...     def forward(ctx, x):
...         ctx.save_for_backward(x)
...         return x**2
...
...     @staticmethod
...     def backward(ctx, grad_output):
...         (x,) = ctx.saved_tensors
...         return grad_output * x  # where 2x is right
>>> report = torchcalc.testing.check_function(Halved.apply, torch.tensor([1.0, -2.0]), include=["gradient"])
>>> bool(report), report["gradient"].cause
(False, 'constant ratio 0.5')

``assert_function`` and so on raise with the report as their message; ``pytest_function`` and so on make a pytest test
of each check; ``python -m torchcalc.testing package.module:name`` is the same from a shell. Each check is one small
function, registered with :func:`check`; add your own in the same way.
"""

from torchcalc.testing.functions import assert_function, assert_loss, check_function, check_loss
from torchcalc.testing.optimizers import assert_optimizer, check_optimizer, pytest_optimizer
from torchcalc.testing.pytest_helper import pytest_function, pytest_loss
from torchcalc.testing.registry import Skip, check
from torchcalc.testing.report import Finding, Report

__all__ = [
    "Finding",
    "Report",
    "Skip",
    "assert_function",
    "assert_loss",
    "assert_optimizer",
    "check",
    "check_function",
    "check_loss",
    "check_optimizer",
    "pytest_function",
    "pytest_loss",
    "pytest_optimizer",
]
