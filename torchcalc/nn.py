"""Every module, under torch.nn's name where torch.nn has one.

>>> import torchcalc.nn
>>> torchcalc.nn.Linear(2, 1, bias=False)
Linear(in_features=2, out_features=1, bias=False)
"""

from torchcalc.activations.abs import Abs
from torchcalc.activations.elu import ELU
from torchcalc.activations.exp import Exp
from torchcalc.activations.gelu import GELU
from torchcalc.activations.glu import GLU
from torchcalc.activations.leaky_relu import LeakyReLU
from torchcalc.activations.log import Log
from torchcalc.activations.logsigmoid import LogSigmoid
from torchcalc.activations.mish import Mish
from torchcalc.activations.relu import ReLU
from torchcalc.activations.sigmoid import Sigmoid
from torchcalc.activations.silu import SiLU
from torchcalc.activations.softplus import Softplus
from torchcalc.activations.square import Square
from torchcalc.activations.tanh import Tanh
from torchcalc.layers.dropout import Dropout
from torchcalc.layers.embedding import Embedding
from torchcalc.layers.group_norm import GroupNorm
from torchcalc.layers.layer_norm import LayerNorm
from torchcalc.layers.linear import Linear
from torchcalc.layers.mlp import MLP, GatedMLP
from torchcalc.layers.rms_norm import RMSNorm
from torchcalc.layers.softmax import LogSoftmax, Softmax
from torchcalc.losses.binary_cross_entropy import BCELoss, BCEWithLogitsLoss
from torchcalc.losses.cross_entropy import CrossEntropyLoss
from torchcalc.losses.gaussian_nll import GaussianNLLLoss
from torchcalc.losses.huber import HuberLoss
from torchcalc.losses.kl_div import KLDivLoss
from torchcalc.losses.l1 import L1Loss
from torchcalc.losses.linear_cross_entropy import LinearCrossEntropyLoss
from torchcalc.losses.mse import MSELoss
from torchcalc.losses.poisson_nll import PoissonNLLLoss
from torchcalc.losses.smooth_l1 import SmoothL1Loss

__all__ = [
    "ELU",
    "GELU",
    "GLU",
    "MLP",
    "Abs",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "Exp",
    "GatedMLP",
    "GaussianNLLLoss",
    "GroupNorm",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LinearCrossEntropyLoss",
    "Log",
    "LogSigmoid",
    "LogSoftmax",
    "MSELoss",
    "Mish",
    "PoissonNLLLoss",
    "RMSNorm",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "SmoothL1Loss",
    "Softmax",
    "Softplus",
    "Square",
    "Tanh",
]
