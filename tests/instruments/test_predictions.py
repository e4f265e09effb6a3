"""Confusion matrices and scatter plots against counting by hand, and from a validation."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn

from tests.instruments.conftest import Regression, loader, read, trainer_of
from torchcalc.instruments import Predictions, confusion_figure, confusion_matrix, scatter_figure
from torchcalc.instruments.figures import pixels


class Classes(LightningModule):
    """Three classes by the sign of a sum; a loss module beside the net, and no forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.loss = nn.Linear(3, 3), nn.CrossEntropyLoss()

    def training_step(self, batch):
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch):
        self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def class_batches():
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    return [(each, each.sum(1).sign().long() + 1) for each in x]


@pytest.mark.parametrize("shape", [(20,), (4, 5), (2, 2, 5)])
def test_confusion_matrix_against_counting(shape):
    target = torch.randint(0, 4, shape)
    output = torch.randn(shape[0], 4, *shape[1:])
    truth = torch.zeros(4, 4, dtype=torch.long)
    for t, p in zip(target.flatten().tolist(), output.argmax(1).flatten().tolist(), strict=True):
        truth[t, p] += 1
    assert torch.equal(confusion_matrix(output, target), truth)


def test_confusion_matrix_of_binary_logits_and_ignored_targets():
    assert confusion_matrix(torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([1, 1, 0])).tolist() == [[0, 1], [1, 1]]
    assert confusion_matrix(torch.eye(2), torch.tensor([0, -100])).tolist() == [[1, 0], [0, 0]]
    with pytest.raises(ValueError, match="class 2, but outputs for 2 classes"):
        confusion_matrix(torch.eye(2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="do not fit"):
        confusion_matrix(torch.eye(2), torch.tensor([0, 1, 0]))
    assert confusion_matrix(torch.tensor([1.0, -1.0]), torch.tensor([1, 2]), 3).tolist() == [
        [0, 0, 0],
        [0, 1, 0],
        [1, 0, 0],
    ]
    assert confusion_matrix(torch.eye(2), torch.tensor([0, 2]), 3).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    for output, least in ((torch.tensor([[0.0, 0.0, 9.0]]), 3), (torch.tensor([1.0]), 2)):
        with pytest.raises(
            ValueError, match=f"classes={least - 1}: the outputs, .*, are for {least}; give at least as many"
        ):
            confusion_matrix(output, torch.tensor([0]), least - 1)


def test_a_validation_is_counted(tmp_path):
    module = Classes()
    trainer = trainer_of(tmp_path, callback := Predictions(budget=None, classes=["less", "even", "more"]))
    trainer.fit(module, loader(class_batches()), loader(class_batches()))
    x, y = (torch.cat(each) for each in zip(*class_batches(), strict=True))
    assert torch.equal(callback.matrix, confusion_matrix(module.net(x), y))
    images = read(tmp_path).images["figures/predictions"]
    assert [step for step, _ in images] == [4, 9]
    assert not module.net._forward_hooks
    shown = torch.frombuffer(bytearray(images[-1][1].convert("RGB").tobytes()), dtype=torch.uint8)
    assert torch.equal(
        shown.view(560, 600, 3), torch.from_numpy(pixels(confusion_figure(callback.matrix, callback.classes)))
    )


def test_a_regression_is_a_scatter_plot(tmp_path):
    trainer = trainer_of(tmp_path, callback := Predictions(max_points=20))
    trainer.fit(Regression(), loader(), loader())
    ((step, image),) = read(tmp_path).images["figures/predictions"]
    assert step == 7
    assert image.size == (560, 560)
    assert sum(len(target) for _, target in callback.points) == 20


def test_every_n_epochs(tmp_path):
    trainer = trainer_of(tmp_path, Predictions(budget=None, every_n_epochs=3), max_epochs=7)
    trainer.fit(Regression(), loader(), loader())
    assert [step for step, _ in read(tmp_path).images["figures/predictions"]] == [11, 23, 27]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(target=5), "there is no target at 5 of a list; set module= and target="),
        (dict(target="y"), "there is no target at 'y' of a list"),
        (dict(module="loss"), r"do not fit"),
    ],
)
def test_what_does_not_fit_is_told_once(tmp_path, arguments, says):
    trainer = trainer_of(tmp_path, Predictions(**arguments))
    with pytest.warns(UserWarning, match=f"Predictions: ValueError: .*{says}.*; it is switched off") as told:
        trainer.fit(Classes(), loader(class_batches()), loader(class_batches()))
    assert len([each for each in told if "Predictions" in str(each.message)]) == 1
    assert "figures/predictions" not in read(tmp_path).images


def test_arguments(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="module='nett': there is no such submodule; children are: net, loss"
    ):
        trainer_of(tmp_path, Predictions(module="nett")).fit(Classes(), loader(class_batches()))
    for arguments in (dict(every_n_epochs=0), dict(max_points=0), dict(task="both")):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
            Predictions(**arguments)
    with pytest.raises(ValueError, match="names: 1 for 2 classes"):
        confusion_figure(torch.eye(2), ["a"])
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        confusion_figure(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must be as many"):
        scatter_figure(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("count", [1, 2, 25, 60])
def test_any_number_of_classes_can_be_drawn(count):
    assert pixels(confusion_figure(torch.eye(count).long())).shape == (560, 600, 3)


def test_r2_against_the_formula():
    y, noise = torch.randn(100, dtype=torch.float64), 0.3 * torch.randn(100, dtype=torch.float64)
    r2 = 1 - noise.square().mean() / y.var(correction=0)
    assert scatter_figure(y + noise, y).axes[0].get_title() == f"R² = {r2:.3f}, 100 points"
    pixels(scatter_figure(torch.tensor([float("nan"), 1.0]), torch.ones(2)))
