"""Accelerate: ``prepare`` wraps the net, the optimizer and the loader; gradients of two batches are added up."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from torchcalc.functional import cross_entropy
from torchcalc.nn import Linear, SiLU
from torchcalc.optim import AdamW


def main(folder: Path) -> float:
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    x = torch.randn(64, 5)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    net = torch.nn.Sequential(Linear(5, 16), SiLU(), Linear(16, 3))
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True)
    net, optimizer, loader = accelerator.prepare(net, AdamW(net.parameters(), lr=0.02, max_norm=1.0), loader)
    for _ in range(8):
        for inputs, target in loader:
            with accelerator.accumulate(net):
                accelerator.backward(cross_entropy(net(inputs), target))
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(str(folder / "last"))
    return cross_entropy(net(x), data.tensors[1]).item()


if __name__ == "__main__":
    print(f"loss {main(Path(sys.argv[1])):.4f}")
