"""The same with Lightning Fabric, which wraps the net, the optimizer and the loss's backward."""

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric

from torchcalc.functional import cross_entropy
from torchcalc.nn import Linear, SiLU
from torchcalc.optim import AdamW
from torchcalc.resume import Loader


def main(folder: Path) -> float:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.seed_everything(0, verbose=False)
    x = torch.randn(64, 5)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    net = torch.nn.Sequential(Linear(5, 16), SiLU(), Linear(16, 3))
    net, optimizer = fabric.setup(net, AdamW(net.parameters(), lr=0.02, max_norm=1.0))
    loader = Loader(data, 16)
    for _ in range(8):
        for inputs, target in loader:
            optimizer.zero_grad()
            fabric.backward(cross_entropy(net(inputs), target))
            optimizer.step()
    fabric.save(folder / "last.ckpt", {"net": net, "optimizer": optimizer})
    return cross_entropy(net(x), data.tensors[1]).item()


if __name__ == "__main__":
    print(f"loss {main(Path(sys.argv[1])):.4f}")
