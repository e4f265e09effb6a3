"""The same with Lightning: an exact resume is one callback."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything

from torchcalc.functional import cross_entropy
from torchcalc.instruments import ExactResume
from torchcalc.nn import Linear, SiLU
from torchcalc.optim import AdamW
from torchcalc.resume import Loader


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(Linear(5, 16), SiLU(), Linear(16, 3))

    def training_step(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=0.02, max_norm=1.0)


def main(folder: Path) -> float:
    seed_everything(0, verbose=False)
    x = torch.randn(64, 5)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    callbacks = [ExactResume(folder)]
    trainer = Trainer(max_epochs=8, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=callbacks)
    resumes = (folder / "last.ckpt").exists()
    trainer.fit(model := Net(), Loader(data, 16), ckpt_path="last" if resumes else None)
    return cross_entropy(model.net(x), data.tensors[1]).item()


if __name__ == "__main__":
    print(f"loss {main(Path(sys.argv[1])):.4f}")
