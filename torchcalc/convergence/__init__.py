"""Choosing the step, and knowing whether training converges."""

from torchcalc.convergence.line_search import LineSearch, line_search
from torchcalc.convergence.range_test import RangeTest, range_test, suggest
from torchcalc.convergence.stability import preconditioner, stability_limit
from torchcalc.convergence.surfaces import SURFACES, Surface
from torchcalc.convergence.verdict import Verdict, predict, verdict

__all__ = [
    "SURFACES",
    "LineSearch",
    "RangeTest",
    "Surface",
    "Verdict",
    "line_search",
    "preconditioner",
    "predict",
    "range_test",
    "stability_limit",
    "suggest",
    "verdict",
]  # fmt: skip
