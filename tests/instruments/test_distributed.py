"""Two processes over gloo: rank zero writes what one process with both halves of the data measures."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

if not dist.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.instruments.conftest import Regression, batches, group, loader, read, trainer_of
from tests.instruments.test_predictions import Classes
from torchcalc.instruments import Instruments, Landscape, LearningRateRangeTest, Predictions, Sharpness
from torchcalc.instruments.objective import Objective


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


class Communicates(Regression):
    """Its loss is the mean over all processes; as a step of a user may be."""

    collective = "all_reduce"

    def training_step(self, batch):
        loss = super().training_step(batch)
        total = loss.detach().clone()
        if self.collective == "all_reduce":
            dist.all_reduce(total)
        elif self.collective == "barrier":
            dist.barrier()
        else:
            total = torch.distributed._functional_collectives.all_reduce(total, "sum", dist.group.WORLD)
        return loss + 0 * total


@pytest.fixture
def two_processes():
    """As far as torch.distributed knows: in this one alone, where nobody would answer."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize("collective", ["all_reduce", "barrier", "functional"])
def test_a_step_that_communicates_is_an_error(collective):
    module = Communicates()
    module.collective = collective
    with pytest.raises(RuntimeError, match=r"Communicates.training_step calls .*which waits for the other processes"):
        Objective(module)(batches()[0])
    assert Objective(Regression())(batches()[0]).isfinite()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sharpness_of_a_step_that_communicates(tmp_path):
    """It is switched off; before, rank zero waited for an answer, and the others for rank zero."""
    trainer = trainer_of(tmp_path, Sharpness(budget=None), strategy="ddp_spawn", devices=2, max_epochs=1)
    trainer.fit(Communicates(), loader())
    assert trainer.state.finished
    assert not group(read(tmp_path), "sharpness")
