"""The digits recipe, run as a user runs it: what it prints, what it leaves, and that it goes on where it stopped."""

import shlex
import shutil
import subprocess

import pytest
import torch
from sklearn.datasets import load_digits

from recipes.data import Digits
from recipes.digits import Classifier, ConvNet, main
from tests.recipes.conftest import curves, run_recipe
from torchcalc.nn import CrossEntropyLoss

STEPS = 17  # an epoch: 1077 training images in batches of 64


def as_set(dataset):
    return {tuple(x.flatten().tolist()) for x, _ in dataset}


def test_report_names_the_run_and_its_files(trained):
    assert trained.report["run"] == "runs/digits/version_0"
    assert trained.report["best checkpoint"] == "runs/digits/version_0/checkpoints/best.ckpt"
    for file in ("config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (trained.folder / trained.report["run"] / file).is_file()


def test_reported_tensorboard_command_finds_the_curves(trained):
    command = [*shlex.split(trained.report["TensorBoard"]), "--inspect"]
    shown = subprocess.run(command, cwd=trained.folder, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "loss/train" in shown.stdout


def test_progress_bar_and_nothing_that_does_not_concern_the_user(trained):
    assert "Epoch 2: 100%" in trained.stdout
    assert "accuracy/val=" in trained.stdout
    assert "site-packages" not in trained.stderr  # every warning names its file
    assert "Tip" not in trained.stderr


def test_curves(trained):
    by_tag = curves(trained.folder / "runs/digits/version_0")
    ends = [STEPS - 1, 2 * STEPS - 1, 3 * STEPS - 1]
    for tag in ("loss/train", "loss/val", "accuracy/train", "accuracy/val"):
        assert [step for step, _ in by_tag[tag]] == ends
    for tag in ("loss/train", "loss/val"):
        assert by_tag[tag][2][1] < by_tag[tag][1][1] < by_tag[tag][0][1]
    assert by_tag["accuracy/val"][2][1] > 0.9
    rates = [value for _, value in by_tag["lr"]]
    assert rates == pytest.approx([3e-3, 3e-3 * 0.85, 3e-3 * 0.85**2])
    assert by_tag["accuracy/test"][0][1] == pytest.approx(float(trained.report["test accuracy"]), abs=5e-5)


def test_best_checkpoint_is_the_one_reported(trained):
    run = trained.folder / "runs/digits/version_0"
    losses = [value for _, value in curves(run)["loss/val"]]
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] == losses.index(min(losses))
    net = ConvNet()
    model = Classifier.load_from_checkpoint(run / "checkpoints/best.ckpt", net=net, loss=CrossEntropyLoss())
    model.eval()
    x, y = Digits().test.tensors
    with torch.no_grad():
        accuracy = (net(x).argmax(1) == y).double().mean().item()
    assert accuracy == pytest.approx(float(trained.report["test accuracy"]), abs=5e-5)


def test_resume_goes_on_in_the_same_run(trained, tmp_path):
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    last = "runs/digits/version_0/checkpoints/last.ckpt"
    resumed = run_recipe(tmp_path, "digits", "--trainer.max_epochs=5", f"--ckpt_path={last}")
    assert resumed.report["run"] == "runs/digits/version_0"
    assert [folder.name for folder in (tmp_path / "runs/digits").iterdir()] == ["version_0"]
    assert "site-packages" not in resumed.stderr
    assert "Epoch 3: 100%" in resumed.stdout
    assert "Epoch 2:" not in resumed.stdout
    assert "v_num=0," in resumed.stdout and "v_num=on" not in resumed.stdout
    before, after = (curves(folder / "runs/digits/version_0") for folder in (trained.folder, tmp_path))
    for tag in ("loss/train", "loss/val", "lr"):
        assert after[tag][:3] == before[tag]
    assert [step for step, _ in after["loss/train"]] == [(epoch + 1) * STEPS - 1 for epoch in range(5)]
    assert after["lr"][4][1] == pytest.approx(3e-3 * 0.85**4)
    checkpoint = torch.load(tmp_path / last, weights_only=True)
    assert checkpoint["global_step"] == 5 * STEPS


def test_testing_a_checkpoint_reports_into_its_run(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    config = (tmp_path / "runs/digits/version_0/config.yaml").read_text()
    main(["test", "--ckpt_path=runs/digits/version_0/checkpoints/best.ckpt"])
    assert "accuracy/test" in capsys.readouterr().out
    assert [folder.name for folder in (tmp_path / "runs/digits").iterdir()] == ["version_0"]
    assert (tmp_path / "runs/digits/version_0/config.yaml").read_text() == config
    first, second = curves(tmp_path / "runs/digits/version_0")["accuracy/test"]
    assert first[1] == second[1]


def test_the_seed_decides_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (3, 3, 4):
        main([f"--seed_everything={seed}", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"])
    first, again, other = (curves(tmp_path / f"runs/digits/version_{n}") for n in range(3))
    assert first == again
    assert first["loss/train"] != other["loss/train"]


def test_the_instruments_take_no_part_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for others in ([], ["--trainer.callbacks=[]"]):
        main(["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", *others])
    (with_them, without) = (curves(tmp_path / f"runs/digits/version_{n}") for n in range(2))
    assert {"sharpness/lambda", "update_ratio/net.strokes.0", "gradient_norm/net.digits.0"} <= set(with_them)
    assert set(without) == {
        "loss/train",
        "loss/val",
        "accuracy/train",
        "accuracy/val",
        "loss/test",
        "accuracy/test",
        "epoch",
    }
    assert all(with_them[tag] == values for tag, values in without.items())


def test_split_is_stratified_disjoint_and_independent_of_the_run_seed():
    torch.manual_seed(0)
    data = Digits()
    torch.manual_seed(1)
    again = Digits()
    splits = (data.train, data.val, data.test)
    assert [len(split) for split in splits] == [1077, 360, 360]
    images, labels = load_digits(return_X_y=True)
    assert sum(len(as_set(split)) for split in splits) == len({tuple(image) for image in images})
    assert not as_set(data.train) & as_set(data.test)
    share = torch.bincount(torch.from_numpy(labels)) / len(labels)
    for split, same in zip(splits, (again.train, again.val, again.test), strict=True):
        count = torch.bincount(split.tensors[1])
        assert (count - share * len(split)).abs().max() < 1
        assert torch.equal(split.tensors[0], same.tensors[0])
    assert as_set(Digits(split_seed=1).test) != as_set(data.test)


@pytest.mark.slow
def test_mean_accuracy_over_five_seeds(tmp_path):
    """What the README promises: the seed decides weights and order, the split stays."""
    accuracies = []
    for seed in range(5):
        run = run_recipe(tmp_path, "digits", f"--seed_everything={seed}", "--trainer.enable_progress_bar=false")
        accuracies.append(float(run.report["test accuracy"]))
    assert sum(accuracies) / 5 >= 0.97, accuracies
