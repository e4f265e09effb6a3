"""A wrong key or value, on the command line or in a YAML file, ends in one line that names it, before training."""

import os
import sys

import pytest
import torch

from recipes.__main__ import main
from tests.recipes.conftest import NAMES, brief

RECIPES = "depth, descent, digits, language_model, learning_rate, regression"
SGD = "optimizer: {class_path: torch.optim.SGD, init_args: {%s}}"

GRADIENT_FLOW = "torchcalc.instruments.GradientFlow"

# what the user typed, what the one line says
ARGUMENTS = [
    ([], f"no recipe given; recipes are: {RECIPES}"),
    (["digit"], f"there is no recipe 'digit'; did you mean 'digits'? recipes are: {RECIPES}"),
    (["mnist"], f"there is no recipe 'mnist'; recipes are: {RECIPES}"),
    (["digits", "fitt"], "there is no command 'fitt'; did you mean 'fit'? commands are: fit, validate, test"),
    (["digits", "predict"], "there is no command 'predict'; commands are: fit, validate, test"),
    (["digits", "--optimizer.lr=1", "test"], "'test' is a command, and comes before the settings"),
    (["digits", "optimizer.lr=1"], "a setting begins with two dashes: --optimizer.lr=1"),
    (["digits", "optimizer.learning_rate=1"], "no option 'optimizer.learning_rate'; did you mean '--optimizer.lr'?"),
    (["digits", "--optimizer.learning_rate=1"], "AdamW: there is no option 'learning_rate'; did you mean 'lr'?"),
    (["regression", "--optimizer.learning_rate=1"], "there is no option 'learning_rate'; did you mean 'lr'?"),
    (["digits", "--learning_rate=1"], "there is no option 'learning_rate'; did you mean 'optimizer.lr'?"),
    (["digits", "--lr=1"], "there is no option 'lr'; did you mean 'optimizer.lr'?"),
    (["digits", "--widht=3"], "there is no option 'widht'; did you mean 'model.net.width'?"),
    (["digits", "--seed=3"], "there is no option 'seed'; did you mean 'seed_everything'?"),
    (["digits", "--epochs=3"], "there is no option 'epochs'; did you mean 'trainer.max_epochs'?"),
    (["digits", "--lr_scheduler.gama=1"], "ExponentialLR: there is no option 'gama'; did you mean 'gamma'?"),
    (["digits", "--optimizer.lr"], "optimizer: its value is missing, as in --setting=value"),
    (["digits", f"--config={sys.executable}"], f"config={sys.executable} is no text; settings in a file are YAML"),
    (["digits", "--model", sys.executable], f"{sys.executable} is no text; settings in a file are YAML"),
    (["digits", "--data.batch_sise=3"], "there is no option 'data.batch_sise'; did you mean 'data.batch_size'?"),
    (["digits", "--trainer.max_epoch=3"], "there is no option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
    (["digits", "--trainer.max_epochs=many"], "trainer.max_epochs: expected int, got 'many'"),
    (["digits", "--data.batch_size=0"], "data.batch_size: Not of type PositiveInt: 0 does not conform"),
    (["digits", "--seed_everything=-1"], "seed_everything: Not of type Seed: -1 does not conform"),
    (["digits", "--trainer.precision=99"], "trainer.precision: expected 64, 32, 16 or 'transformer-engine', "),
    (["digits", "--model.net.init_args.widht=3"], "there is no option 'widht'; did you mean 'width'?"),
    (["digits", "--model.net=Foo"], "model.net: there is no class 'Foo': give its full path"),
    (["digits", "--model.net=torch.nn.Foo"], "model.net: torch.nn.Foo: module 'torch.nn' has no attribute 'Foo'"),
    (["digits", "--model.net=torch.optim.SGD"], "model.net: Import path torch.optim.SGD does not correspond to a subc"),
    (["digits", "--model.loss=torchcalc.nn.CrossEntropy"], "torchcalc.nn.CrossEntropy: "),
    (["digits", "--optimizer=torchcalc.optim.AdamX"], "module 'torchcalc.optim' has no attribute 'AdamX'"),
    (["digits", "--optimizer.lr=fast"], "optimizer: torchcalc.optim.AdamW: lr: expected float, got 'fast'"),
    (["digits", "--optimizer.lr=-1"], "torchcalc.optim.adam.AdamW: Invalid learning rate: -1.0"),
    (["digits", "--lr_scheduler.gamma=x"], "torch.optim.lr_scheduler.ExponentialLR: gamma: expected float, got 'x'"),
    (
        ["digits", "--trainer.accelerator=gpus"],
        "Trainer: You selected an invalid accelerator name",
    ),
    (["digits", "--trainer.max_epochs=-7"], "Trainer: `max_epochs` must be a non-negative integer or -1"),
    (["digits", "--trainer.callbacks+=EarlyStoping"], "trainer.callbacks: there is no class 'EarlyStoping'"),
    (
        ["descent", "--trainer.logger=false", "--ckpt_path=last"],
        "of the newest run, and trainer.logger=false keeps none",
    ),
    (["digits", "--ckpt_path=nowhere.ckpt"], "ckpt_path: there is no file 'nowhere.ckpt'"),
    (["digits", f"--ckpt_path={__file__}"], "is no checkpoint, or was cut short"),
    (
        ["language_model", "--data.file=nowhere.txt"],
        "recipes.text.Text: file=nowhere.txt: No such file or directory; leave",
    ),
    (["language_model", f"--data.file={sys.executable}"], "is no text in UTF-8"),
    (["language_model", "--data.file=/dev/null"], "file=/dev/null: 0 characters are too few"),
    (["language_model", f"--data.file={os.getcwd()}"], f"file={os.getcwd()}: Is a directory; leave it out to learn"),
    (["language_model", f"--data.file={__file__}"], "characters are too few; twenty blocks of 4096 are needed"),
    (["language_model", "--data.vocabulary=100"], "vocabulary=100: must be at least 256, the bytes"),
    (["language_model", "--data.context=9999"], "context=9999: a part of the text has"),
    (["language_model", "--model.heads=3"], "width=128: must be a multiple of heads=3"),
    (["language_model", "--model.parts=jax"], "model.parts: expected 'torchcalc', 'torch', got 'jax'"),
    (["descent", "--optimizer=torch.optim.SGD"], "there is no option 'optimizer'"),
    (
        ["digits", f"--trainer.callbacks+={GRADIENT_FLOW}", "--trainer.callbacks.init_args.budget=2"],
        "error: budget=2.0: must be a share of the training time between 0 and 1, or None (JSON",
    ),
    (["digits", "--config=nowhere.yaml"], "File does not exist: '{cwd}/nowhere.yaml'"),
]
FILES = [
    ("modle: {net: 3}", "there is no option 'modle.net'; did you mean 'model.net'?"),
    ("model: {nett: 3}", "there is no option 'model.nett'; did you mean 'model.net'?"),
    ("trainer: {max_epochs: many}", "trainer.max_epochs: expected int, got 'many'"),
    (SGD % "lrr: 2", "optimizer: torch.optim.SGD: there is no option 'lrr'; did you mean 'lr'?"),
    (SGD % "lr: fast", "optimizer: torch.optim.SGD: lr: expected float, got 'fast'"),
    (SGD % "momentum: -1", "torch.optim.sgd.SGD: Invalid momentum value: -1"),
    ("optimizer: {class_path: torch.optim.SGD, lr: 3}", "beside class_path only init_args is allowed"),
    ("optimizer: {class_path: AdamW}", "optimizer: Multiple subclasses with name AdamW. Give the full class path"),
    ("trainer: {callbacks: [{class_path: torch.optim.SGD}]}", "torch.optim.SGD does not correspond to a subclass of C"),
    ("trainer: [", "Problems parsing config: "),
    ("trainer", "Unexpected config: trainer"),
    ("trainer: {callbacks: [{class_path: Checkpointt}]}", "trainer.callbacks: there is no class 'Checkpointt'"),
]


def refuse(argv, capsys, monkeypatch, tmp_path):
    """Run a recipe that must fail before it leaves anything in the folder; return what it said."""
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert set(tmp_path.iterdir()) == before, "training had started"
    return capsys.readouterr().err


@pytest.mark.parametrize(("argv", "says"), ARGUMENTS, ids=[" ".join(argv) or "nothing" for argv, _ in ARGUMENTS])
def test_argument(argv, says, capsys, monkeypatch, tmp_path):
    *others, error = refuse(argv, capsys, monkeypatch, tmp_path).splitlines()
    assert all("Seed set to 0" in line for line in others)
    assert error.startswith("error: ")
    assert says.format(cwd=os.getcwd()) in error


@pytest.mark.parametrize(("text", "says"), FILES, ids=[text for text, _ in FILES])
def test_file(text, says, capsys, monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    test_argument(["digits", "--config=mine.yaml"], says, capsys, monkeypatch, tmp_path)


@pytest.mark.parametrize("callback", ["ModelCheckpoint", "EarlyStopping"])
def test_monitor_that_nothing_logs(callback, capsys, monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"trainer: {{callbacks: [{{class_path: {callback}, init_args: {{monitor: los/val}}}}]}}"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["digits", "--config=mine.yaml"])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert err.endswith(f"error: {callback}: monitor: nothing logs 'los/val'; did you mean 'loss/val'?\n")
    assert "Epoch 0" not in out
    assert not list(tmp_path.rglob("*.ckpt"))


def test_what_the_trainer_or_a_callback_refuses(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["digits", "--trainer.logger=false"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: GradientFlow: the trainer has no logger")


def some_fast(*fast):
    """All recipes, of which some are in the fast suite."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_no_checkpoint(name, capsys, monkeypatch, tmp_path):
    (tmp_path / "noise.ckpt").write_bytes(bytes(range(256)))
    for given, says in (
        ("last", f"'last' is that of the newest run, but no run in 'runs/{name}' has a checkpoint"),
        ("noise.ckpt", "'noise.ckpt' is no checkpoint, or was cut short"),
    ):
        error = refuse([name, f"--ckpt_path={given}"], capsys, monkeypatch, tmp_path).splitlines()[-1]
        assert error == f"error: ckpt_path: {says}"


@pytest.mark.parametrize("name", ["depth", "descent", "learning_rate", "regression"])
def test_one_process(name, capsys, monkeypatch, tmp_path):
    two = ["--trainer.devices=2", "--trainer.accelerator=cpu"]
    error = refuse([name, *two], capsys, monkeypatch, tmp_path).splitlines()[-1]
    assert (
        error
        == f"error: trainer.devices: {name} learns on one process; leave trainer.devices and trainer.num_nodes out"
    )


def one_error(argv, capsys):
    """Run a recipe that must fail; return its exit status and the last line it said."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    err = capsys.readouterr().err
    return end.value.code, err.splitlines()[-1]


@pytest.mark.parametrize("name", some_fast("descent", "digits"))
def test_a_folder_that_cannot_be_written(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    code, error = one_error([name, "--trainer.enable_progress_bar=false"], capsys)
    assert code == 2
    assert error.startswith(f"error: Not a directory: '{tmp_path}/runs/{name}")
    assert "--trainer.logger.save_dir=DIR names another" in error
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.parametrize("name", some_fast("digits"))
def test_a_full_disk(name, capsys, monkeypatch, tmp_path):
    save = torch.save

    def full(content, file):
        file.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        save(content, file)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "save", full)
    code, error = one_error([*brief(name), "--trainer.enable_progress_bar=false"], capsys)
    assert code == 2
    assert error.startswith(f"error: No space left on device: 'runs/{name}/version_0/checkpoints/last.ckpt'; if it is")


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        main(["digits", "--optimizer.lr=-1"])
