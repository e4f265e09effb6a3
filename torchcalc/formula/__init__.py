"""One formula, every backend: what is pointwise is written once, and everything else is made from it."""

from torchcalc.formula.expression import Expression, Term, maximum, minimum, times, where
from torchcalc.formula.pointwise import loss, pointwise

__all__ = ["Expression", "Term", "loss", "maximum", "minimum", "pointwise", "times", "where"]
