"""torchcalc: the calculus of learning, as PyTorch parts.

Every derivative is derived by hand in the file that computes it, and proven by machine in the test beside it.

>>> import torch, torchcalc
>>> x = torch.tensor(3.0, requires_grad=True)
>>> torchcalc.functional.square(x).backward()  # f(x) = x², f'(x) = 2x
>>> x.grad
tensor(6.)
"""

from torchcalc import autograd, calculus, convergence, functional, nn, optim

__version__ = "0.1.0"

__all__ = ["__version__", "autograd", "calculus", "convergence", "functional", "nn", "optim"]
