"""Gradient descent and its variants, drop-in for ``torch.optim``: one driver (``optimizer.py``), one rule each."""

from torchcalc.optim.adagrad import Adagrad
from torchcalc.optim.adam import Adam, AdamW
from torchcalc.optim.gradient_descent import GradientDescent
from torchcalc.optim.lion import Lion
from torchcalc.optim.nadam import NAdam
from torchcalc.optim.optimizer import Optimizer
from torchcalc.optim.rmsprop import RMSprop
from torchcalc.optim.sgd import SGD
from torchcalc.optim.tensor_list import TensorList

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "GradientDescent", "Lion", "NAdam", "Optimizer", "RMSprop", "TensorList"]
