"""In a Lightning module, by the import swapped, and from YAML by the full class path."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.cases import CASES, Case, build, same
from torchcalc import optim as ours

lightning = pytest.importorskip("lightning.pytorch")

# Lightning 2.6 and torch 2.13 between them; none is ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


class Regression(lightning.LightningModule):  # type: ignore[name-defined,misc]
    def __init__(self, case: Case, config: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.case, self.config = case, config

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        return (self.net(x) - x.sum(1, keepdim=True)).pow(2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = build(self.case.cls, self.parameters(), self.config)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(module: Any, **options: Any) -> Any:
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fit_with_gradient_clipping(case: Case, precision: str) -> None:
    module = Regression(case, dict(lr=0.01))
    before = module.net.weight.detach().clone()
    fit(module, gradient_clip_val=0.5, precision=precision)
    assert not torch.equal(module.net.weight, before)
    assert module.net.weight.isfinite().all()


def test_it_trains_as_torchs_does() -> None:
    twins = [Regression(Case(cls, None, ()), dict(lr=0.01, foreach=False)) for cls in (ours.AdamW, torch.optim.AdamW)]
    for module in twins:
        fit(module, gradient_clip_val=0.5)
    same(twins[0].net.weight, twins[1].net.weight)


def test_a_checkpoint_resumes(tmp_path: Path) -> None:
    module = Regression(Case(ours.AdamW, None, ()), dict(lr=0.01))
    trainer = fit(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert set(saved["optimizer_states"][0]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    again = build(ours.AdamW, module.parameters(), dict(lr=0.5))
    again.load_state_dict(saved["optimizer_states"][0])
    assert again.state[module.net.weight]["step"].item() == 8
