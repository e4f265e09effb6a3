"""Derivatives, gradients and curvature of any function or model, in the words of a textbook."""

from torchcalc.calculus.backward_graph import BackwardGraph, BackwardNode, backward_graph
from torchcalc.calculus.curvature import Curvature, curvature, curvature_along
from torchcalc.calculus.derivative import (
    derivative,
    directional_derivative,
    gradient,
    hessian,
    hvp,
    jacobian,
    partial,
)
from torchcalc.calculus.finite_difference import NumericDerivative, SecantTable, numeric_derivative, secant_table
from torchcalc.calculus.training_loss import TrainingLoss, training_loss

__all__ = [
    "BackwardGraph",
    "BackwardNode",
    "Curvature",
    "NumericDerivative",
    "SecantTable",
    "TrainingLoss",
    "backward_graph",
    "curvature",
    "curvature_along",
    "derivative",
    "directional_derivative",
    "gradient",
    "hessian",
    "hvp",
    "jacobian",
    "numeric_derivative",
    "partial",
    "secant_table",
    "training_loss",
]
