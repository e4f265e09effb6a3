"""Every differentiable function, under torch's name where torch has one.

>>> import torch
>>> import torchcalc.functional as F
>>> F.relu(torch.tensor([-1.0, 2.0]))
tensor([0., 2.])
"""

from torchcalc.activations.gelu import gelu
from torchcalc.activations.relu import relu
from torchcalc.activations.sigmoid import sigmoid
from torchcalc.activations.square import square
from torchcalc.activations.tanh import tanh
from torchcalc.layers.linear import linear
from torchcalc.layers.softmax import log_softmax, softmax
from torchcalc.losses.binary_cross_entropy import binary_cross_entropy_with_logits
from torchcalc.losses.cross_entropy import cross_entropy
from torchcalc.losses.huber import huber_loss
from torchcalc.losses.l1 import l1_loss
from torchcalc.losses.mse import mse_loss

__all__ = [
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "gelu",
    "huber_loss",
    "l1_loss",
    "linear",
    "log_softmax",
    "mse_loss",
    "relu",
    "sigmoid",
    "softmax",
    "square",
    "tanh",
]
