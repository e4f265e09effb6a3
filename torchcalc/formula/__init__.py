"""One formula, every backend: what is pointwise is written once, and everything else is made from it."""

from torchcalc.formula.expression import Expression, maximum, minimum, where

__all__ = ["Expression", "maximum", "minimum", "where"]
