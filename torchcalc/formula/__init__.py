"""One formula, every backend: what is pointwise is written once, and everything else is made from it."""

from torchcalc.formula.expression import Expression, Term, maximum, minimum, where
from torchcalc.formula.pointwise import loss, pointwise

__all__ = ["Expression", "Term", "loss", "maximum", "minimum", "pointwise", "where"]
