"""Deep nets, and what happens to a gradient on its way down through their layers.

It is a product with one factor for each layer that it passes. At initialisation, with weights of variance s/width and many
units, the mean square of such a factor is

    χ = s·E[φ'(√q·z)²],   z ~ N(0, 1),   with q such that   q = s·E[φ(√q·z)²].                                     (1)

Sigmoid: φ' <= 1/4, so √χ <= √s/4: k layers further down, 4⁻ᵏ or less is left. ReLU: φ'² is 1 half of the time, so s = 2
gives χ = 1, but on average only: chance drives the products of a narrow net apart, and its outputs together.

Residual with norm: x + relu(W·norm(x)) passes a gradient on as it is, and adds to it. norm(x) has mean 0 and variance 1 over
the units. With s = 2/depth the mean square of relu(W·norm(x)) is 1/depth, of which 1/(π·depth) is the square of its mean:
its variance is a/depth with a = 1 − 1/π. So after a part t of the layers the variance of x is

    v(t) = 1 + a·t,                                                                                                (2)

from 1 at the input to 1.68 at the output. On the way back a layer adds the part s/(2v) to the gradient's mean square, 1/2
for the relu's slope, 1/v for the norm's. Through the whole net it grows by the factor

    exp ∫₀¹ dt/v(t) = (1 + a)^(1/a) = 2.14,                                                                        (3)

the gradient itself by √2.14 = 1.46, whatever the depth.

Reference: He et al. 2015, arXiv:1502.01852; Schoenholz et al. 2017, arXiv:1611.01232; Zhang et al. 2019, arXiv:1901.09321.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from torchcalc import nn as calc
from torchcalc.calculus import derivative

VARIANCE = {"sigmoid": 1.0, "ReLU": 2.0, "residual": 2.0}  # s in (1)


def linear(inputs: int, outputs: int, s: float) -> calc.Linear:
    """A linear layer whose weights have variance s/inputs."""
    layer = calc.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=math.sqrt(s / inputs))
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Sequential):
    """What its layers add to their input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def deep_net(kind: str, depth: int, width: int) -> nn.Sequential:
    """``depth`` linear layers, (N, 1, 8, 8) -> (N, 10): sigmoid or ReLU between them, or residual blocks with norm."""
    s = VARIANCE[kind]
    active = calc.Sigmoid if kind == "sigmoid" else calc.ReLU
    layers: list[nn.Module] = [nn.Flatten(), nn.LayerNorm(64, elementwise_affine=False), linear(64, width, 1.0)]
    for _ in range(depth - 2):
        if kind == "residual":
            layers += [Residual(nn.LayerNorm(width), linear(width, width, s / depth), active())]
        else:
            layers += [active(), linear(width, width, s)]
    if kind == "residual":
        layers += [nn.LayerNorm(width)]
    return nn.Sequential(*layers, active(), linear(width, 10, 1.0))


def gain(kind: str) -> float:
    """√χ, the factor by which one more layer changes the gradient's norm, by (1)."""
    if kind == "residual":
        return 1.0
    f = torch.sigmoid if kind == "sigmoid" else torch.relu
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.softmax(-(z**2) / 2, 0)
    q = 1.0
    for _ in range(100):
        q = float(VARIANCE[kind] * density @ f(math.sqrt(q) * z) ** 2)
    return math.sqrt(VARIANCE[kind] * density @ derivative(f)(math.sqrt(q) * z) ** 2)


@torch.inference_mode(False)
@torch.enable_grad()
def weight_gradients(net: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Norm of the gradient of each linear layer's weights, from input to output, in float64: float32 ends at 1e-45."""
    net = deepcopy(net).cpu().double()
    weights = [layer.weight for layer in net.modules() if isinstance(layer, calc.Linear)]
    loss = calc.CrossEntropyLoss()(net(x.double()), y)
    return [gradient.norm().item() for gradient in torch.autograd.grad(loss, weights)]
