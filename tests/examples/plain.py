"""A loop in plain PyTorch: our modules, loss, optimizer, and a resume by torchcalc.resume."""

import sys
from pathlib import Path

import torch

from torchcalc.nn import CrossEntropyLoss, Linear, SiLU
from torchcalc.optim import AdamW
from torchcalc.resume import Loader, rng_state, save, set_rng_state


def main(folder: Path) -> float:
    torch.manual_seed(0)
    x = torch.randn(64, 5)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    net = torch.nn.Sequential(Linear(5, 16), SiLU(), Linear(16, 3))
    criterion, optimizer = CrossEntropyLoss(), AdamW(net.parameters(), lr=0.02, max_norm=1.0)
    loader, path = Loader(data, 16), folder / "last.ckpt"
    if path.exists():
        checkpoint = torch.load(path)
        for part, name in ((net, "net"), (optimizer, "optimizer"), (loader, "loader")):
            part.load_state_dict(checkpoint[name])
        set_rng_state(checkpoint["rng"])
    while loader.epoch < 8:
        for inputs, target in loader:
            optimizer.zero_grad()
            loss = criterion(net(inputs), target)
            loss.backward()
            optimizer.step()
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
        save({**state, "rng": rng_state()}, path)
    return criterion(net(x), data.tensors[1]).item()


if __name__ == "__main__":
    print(f"loss {main(Path(sys.argv[1])):.4f}")
