"""Gradient descent and its variants, drop-in for ``torch.optim``: one driver (``optimizer.py``), one rule each."""

from torchcalc.optim.adadelta import Adadelta
from torchcalc.optim.adagrad import Adagrad
from torchcalc.optim.adam import Adam, AdamW
from torchcalc.optim.adamax import Adamax
from torchcalc.optim.asgd import ASGD
from torchcalc.optim.gradient_descent import GradientDescent
from torchcalc.optim.lion import Lion
from torchcalc.optim.nadam import NAdam
from torchcalc.optim.optimizer import Optimizer
from torchcalc.optim.radam import RAdam
from torchcalc.optim.rmsprop import RMSprop
from torchcalc.optim.rprop import Rprop
from torchcalc.optim.sgd import SGD
from torchcalc.optim.tensor_list import TensorList

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "GradientDescent",
    "Lion",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "TensorList",
]
