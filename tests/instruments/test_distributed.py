"""Two processes over gloo: rank zero writes what one process with both halves of the data measures."""

from __future__ import annotations

import pytest
import torch

from tests.instruments.conftest import Regression, batches, group, loader, read, trainer_of
from tests.instruments.test_predictions import Classes
from torchcalc.instruments import Instruments, Landscape, LearningRateRangeTest, Predictions


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's and torch's, of processes and of gloo
def test_ddp(tmp_path):
    x, y = (torch.cat(each) for each in zip(*batches(), strict=True))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    options = dict(strategy="ddp_spawn", devices=2, max_epochs=1)
    trainer = trainer_of(tmp_path, Instruments(), Landscape(resolution=3), **options)
    trainer.fit(Regression(), data, data)
    found = read(tmp_path)
    assert set(found.images) == {f"figures/{n}" for n in ("gradient_norm", "update_ratio", "predictions", "landscape")}
    # Lightning shuffles, with the seed 0. A rank sees every other example: together they see one batch of eight.
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).view(4, 8)
    trainer = trainer_of(tmp_path / "one", Instruments(), max_epochs=1)
    trainer.fit(Regression(), loader([(x[i], y[i]) for i in order]), loader())
    one = read(tmp_path / "one")
    for name in ("gradient_norm", "update_ratio"):
        for layer, curve in group(one, name).items():
            assert group(found, name)[layer] == [(step, pytest.approx(value, rel=1e-4)) for step, value in curve]
    assert found.scalars["sharpness/lambda"][0][1] > 0
    assert len(found.tensors["custom_scalars__config__"]) == 2  # of rank zero, at the start and once all is known


class OnlyPredicts(Classes):
    def validation_step(self, batch):
        self.net(batch[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_rank_waits_for_one_that_has_failed(tmp_path):
    """Every second example, which are those of rank one, has a class that is none."""
    x = torch.randn(8, 3)
    train, val = (torch.utils.data.TensorDataset(x, torch.tensor([0, wrong] * 4)) for wrong in (1, 7))
    trainer = trainer_of(tmp_path, Predictions(budget=None), strategy="ddp_spawn", devices=2, max_epochs=2)
    trainer.fit(OnlyPredicts(), *(torch.utils.data.DataLoader(data, batch_size=2) for data in (train, val)))
    assert trainer.state.finished
    assert not read(tmp_path).images


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_ranks_take_the_rate_that_rank_zero_found(tmp_path):
    test = LearningRateRangeTest(steps=40)
    trainer = trainer_of(tmp_path, test, strategy="ddp_spawn", devices=2, max_epochs=1)
    trainer.fit(module := Regression(), loader())
    assert trainer.callback_metrics  # it ended
    assert all(p.isfinite().all() for p in module.parameters())
