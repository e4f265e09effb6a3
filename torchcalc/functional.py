"""Every differentiable function, under torch's name where torch has one.

>>> import torch
>>> import torchcalc.functional as F
>>> F.relu(torch.tensor([-1.0, 2.0]))
tensor([0., 2.])
"""

from torchcalc.activations.abs import abs
from torchcalc.activations.elu import elu
from torchcalc.activations.exp import exp
from torchcalc.activations.gelu import gelu
from torchcalc.activations.glu import geglu, glu, reglu, swiglu
from torchcalc.activations.leaky_relu import leaky_relu
from torchcalc.activations.log import log
from torchcalc.activations.logsigmoid import logsigmoid
from torchcalc.activations.mish import mish
from torchcalc.activations.relu import relu
from torchcalc.activations.sigmoid import sigmoid
from torchcalc.activations.silu import silu
from torchcalc.activations.softcap import softcap
from torchcalc.activations.softplus import softplus
from torchcalc.activations.square import square
from torchcalc.activations.tanh import tanh
from torchcalc.layers.add_rms_norm import add_rms_norm
from torchcalc.layers.attention import scaled_dot_product_attention
from torchcalc.layers.dropout import dropout
from torchcalc.layers.embedding import embedding
from torchcalc.layers.group_norm import group_norm
from torchcalc.layers.layer_norm import layer_norm
from torchcalc.layers.linear import linear
from torchcalc.layers.mlp import gated_mlp, mlp
from torchcalc.layers.rms_norm import rms_norm
from torchcalc.layers.softmax import log_softmax, softmax
from torchcalc.losses.binary_cross_entropy import binary_cross_entropy, binary_cross_entropy_with_logits
from torchcalc.losses.cross_entropy import cross_entropy
from torchcalc.losses.gaussian_nll import gaussian_nll_loss
from torchcalc.losses.huber import huber_loss
from torchcalc.losses.kl_div import kl_div
from torchcalc.losses.l1 import l1_loss
from torchcalc.losses.linear_cross_entropy import linear_cross_entropy
from torchcalc.losses.mse import mse_loss
from torchcalc.losses.poisson_nll import poisson_nll_loss
from torchcalc.losses.smooth_l1 import smooth_l1_loss

__all__ = [
    "abs",
    "add_rms_norm",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "dropout",
    "elu",
    "embedding",
    "exp",
    "gated_mlp",
    "gaussian_nll_loss",
    "geglu",
    "gelu",
    "glu",
    "group_norm",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_cross_entropy",
    "log",
    "log_softmax",
    "logsigmoid",
    "mish",
    "mlp",
    "mse_loss",
    "poisson_nll_loss",
    "reglu",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "softcap",
    "softmax",
    "softplus",
    "square",
    "swiglu",
    "tanh",
]
