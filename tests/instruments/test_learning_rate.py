"""Curves of learning rates; the range test sets them before training, and leaves all else alone."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor

from tests.instruments.conftest import Regression, batches, fit, group, loader, read, trainer_of
from tests.instruments.test_gradient_flow import TwoOptimizers
from torchcalc.convergence import range_test
from torchcalc.instruments import LearningRate, LearningRateRangeTest, learning_rates
from torchcalc.instruments.objective import Objective, no_target


def two_groups(module):
    return [{"params": module.net[0].parameters(), "lr": 0.1}, {"params": module.net[2].parameters(), "lr": 0.02}]


class Scheduled(Regression):
    def __init__(self, schedule, groups=None):
        super().__init__()
        self.schedule, self.groups = schedule, groups

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(two_groups(self) if self.groups else self.parameters(), lr=0.1)
        scheduler = self.schedule(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_curve_of_a_schedule(tmp_path):
    fit(tmp_path, Scheduled(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)), LearningRate())
    assert read(tmp_path).scalars["lr"] == [(i, pytest.approx(0.1 * 0.5**i)) for i in range(8)]


def test_curves_of_groups_and_optimizers(tmp_path):
    module = Scheduled(lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0), groups=2)
    fit(tmp_path / "a", module, LearningRate())
    assert learning_rates(module.optimizers()) == {"0": 0.1, "1": 0.02}
    assert {k: v[0][1] for k, v in group(read(tmp_path / "a"), "lr").items()} == pytest.approx({"0": 0.1, "1": 0.02})
    fit(tmp_path / "b", TwoOptimizers(), LearningRate())
    assert {k: v[0][0] for k, v in group(read(tmp_path / "b"), "lr").items()} == {"0/0": 0, "1/0": 1}


def test_beside_lightnings_monitor_it_is_silent(tmp_path):
    module = Scheduled(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))
    fit(tmp_path, module, LearningRate(), LearningRateMonitor())
    assert [tag for tag in read(tmp_path).scalars if tag.startswith("lr")] == ["lr-SGD"]


def test_range_test_sets_the_rate_that_the_function_suggests(tmp_path):
    module = Regression()
    optimizer = module.configure_optimizers()
    pairs = [((list(batch),), None) for batch in batches()]
    truth = range_test(Objective(module), no_target, pairs, optimizer, low=1e-6, high=10.0, steps=60)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    seen = []

    class Looking(LearningRate):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not seen:
                seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    fit(tmp_path, module, LearningRateRangeTest(steps=60), Looking())
    assert all(torch.equal(before[name], p) for name, p in seen[0].items())
    assert read(tmp_path).scalars["lr"][0][1] == pytest.approx(truth.suggestion, rel=1e-4)
    ((step, image),) = read(tmp_path).images["figures/range_test"]
    assert step == 0
    assert image.size[0] >= 500


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), [1, 0.5, 0.25]),
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)), [1, 1 / 2, 1 / 3]),
        (lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=2), [0.1, 0.55, 1.0]),
        (lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 2), [1.0, 0.5, 0.0]),
        (
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [
                    torch.optim.lr_scheduler.ConstantLR(o, 0.5, total_iters=2),
                    torch.optim.lr_scheduler.ExponentialLR(o, 0.1),
                ],
                milestones=[2],
            ),
            [0.5, 0.5, 1.0, 0.1],
        ),
    ],
    ids=["exponential", "lambda", "warm-up", "cosine", "sequential"],
)
@pytest.mark.filterwarnings(
    "ignore:The epoch parameter in `scheduler.step:UserWarning"
)  # torch's SequentialLR calls it
def test_schedules_and_ratios_between_groups_stay(tmp_path, schedule, factors):
    test = LearningRateRangeTest(steps=40)
    fit(tmp_path, Scheduled(schedule, groups=2), test, LearningRate(), max_epochs=1)
    curves = group(read(tmp_path), "lr")
    for name, ratio in (("0", 1.0), ("1", 0.2)):
        rates = [v for _, v in curves[name]][: len(factors)]
        assert rates == pytest.approx([test.suggestion * ratio * factor for factor in factors], rel=1e-5, abs=1e-12)


def test_the_data_come_in_the_order_they_would_have(tmp_path):
    seen = []

    class Looking(Regression):
        def training_step(self, batch):
            seen.append(batch[0][0].tolist())
            return super().training_step(batch)

    x, y = (torch.cat(each) for each in zip(*batches(), strict=True))
    for i in range(2):
        torch.manual_seed(0)
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
        callbacks = [LearningRateRangeTest(steps=60)] if i else []
        trainer_of(tmp_path / str(i), *callbacks).fit(Looking(), data)
    assert seen[:8] == seen[-8:]


def test_a_resumed_training_keeps_its_rate(tmp_path):
    trainer = fit(tmp_path, Regression(), test := LearningRateRangeTest(steps=40), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = trainer_of(tmp_path / "again", LearningRateRangeTest(steps=40), LearningRate(), max_epochs=2)
    again.fit(Regression(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.callbacks[0].suggestion is None
    assert read(tmp_path / "again").scalars["lr"][0] == (4, pytest.approx(test.suggestion, rel=1e-5))


def test_where_nothing_decreases_the_rate_is_left_alone(tmp_path):
    with pytest.warns(UserWarning, match="no rate of the range decreases the loss; the learning rate is left alone"):
        fit(tmp_path, Regression(), LearningRateRangeTest(low=1e-20, high=1e-18, steps=10), LearningRate())
    assert read(tmp_path).scalars["lr"][0][1] == pytest.approx(0.05)


class Again(torch.utils.data.IterableDataset):
    """It has no length, and begins anew."""

    def __iter__(self):
        return iter(batches())


@pytest.mark.parametrize("data", [Again(), loader(Again()), [loader(), loader()], {"a": loader(Again())}])
def test_data_without_a_length_and_several(tmp_path, data):
    seen = []

    class Looking(Regression):
        def training_step(self, batch):
            batch = batch["a"] if isinstance(batch, dict) else batch
            batch = batch[0] if isinstance(batch[0], (list, tuple)) else batch
            seen.append(batch[0][0].tolist())
            return super().training_step(batch)

    trainer_of(tmp_path, test := LearningRateRangeTest(steps=40), max_epochs=1).fit(Looking(), data)
    assert test.suggestion > 0
    assert seen[-4:] == [x[0].tolist() for x, _ in batches()]


def test_what_no_range_test_can_be_made_with(tmp_path):
    for data in (iter(batches()), [loader(), iter(batches())]):
        with pytest.raises(
            MisconfigurationException, match=r"the training data are a list_iterator, .* pass a DataLoader"
        ):
            trainer_of(tmp_path, LearningRateRangeTest()).fit(Regression(), data)
    still = Regression(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    with pytest.raises(MisconfigurationException, match="the optimizer's lr is 0, which no factor changes"):
        fit(tmp_path, still, LearningRateRangeTest())


def test_arguments(tmp_path):
    for arguments in (dict(low=0.0), dict(low=1.0, high=0.5), dict(steps=4), dict(batches=0), dict(batches=None)):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}=[^,]*(: must be at least|, high=)"):
            LearningRateRangeTest(**arguments)
    two = TwoOptimizers()
    two.loss_of = lambda batch: None
    with pytest.raises(MisconfigurationException, match="one optimizer is needed, not 2"):
        fit(tmp_path, two, LearningRateRangeTest(objective="loss_of"))
