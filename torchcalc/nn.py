"""Every module, under torch.nn's name where torch.nn has one.

>>> import torchcalc.nn
>>> torchcalc.nn.Linear(2, 1, bias=False)
Linear(in_features=2, out_features=1, bias=False)
"""

from torchcalc.activations.gelu import GELU
from torchcalc.activations.relu import ReLU
from torchcalc.activations.sigmoid import Sigmoid
from torchcalc.activations.square import Square
from torchcalc.activations.tanh import Tanh
from torchcalc.layers.linear import Linear
from torchcalc.layers.softmax import LogSoftmax, Softmax
from torchcalc.losses.binary_cross_entropy import BCEWithLogitsLoss
from torchcalc.losses.cross_entropy import CrossEntropyLoss
from torchcalc.losses.huber import HuberLoss
from torchcalc.losses.l1 import L1Loss
from torchcalc.losses.mse import MSELoss

__all__ = [
    "GELU",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "HuberLoss",
    "L1Loss",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "ReLU",
    "Sigmoid",
    "Softmax",
    "Square",
    "Tanh",
]
