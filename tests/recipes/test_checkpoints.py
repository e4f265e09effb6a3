"""What ``--ckpt_path`` names is found and known to fit, or refused in one line before anything in a run changes."""

import shutil

import pytest
import torch

from recipes.__main__ import main
from tests.recipes.conftest import BRIEF

LAST = "runs/digits/version_0/checkpoints/last.ckpt"
QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A folder with the run of three epochs, and beside it files that are no checkpoint of it."""
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    content = torch.load(tmp_path / LAST, weights_only=True)
    net = torch.nn.Linear(2, 2)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    torch.save(net, tmp_path / "module.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({**content, "recipe": "depth"}, tmp_path / "depth.ckpt")
    torch.save({**content, "state_dict": net.state_dict()}, tmp_path / "another_net.ckpt")
    del content["optimizer_states"][0]["param_groups"][0]["params"][0]
    torch.save(content, tmp_path / "another_optimizer.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / LAST).read_bytes()[:10_000])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


REFUSED = {
    "another width": (["--model.net.width=16", f"--ckpt_path={LAST}"], "net.strokes.0.weight is of shape (32, 1, 3, 3) in"),
    "another net": (["--ckpt_path=another_net.ckpt"], "net.strokes.0.weight is missing in 'another_net.ckpt', and of shape"),
    "weights alone": (["--ckpt_path=weights.pt"], "'weights.pt' is no checkpoint of Lightning"),
    "a module": (["--ckpt_path=module.pt"], "'module.pt' holds more than tensors and numbers"),
    "a list": (["--ckpt_path=list.pt"], "'list.pt' is no checkpoint of Lightning"),
    "another recipe": (["--ckpt_path=depth.ckpt"], "'depth.ckpt' is of the recipe 'depth', and this is 'digits'"),
    "cut short": (["--ckpt_path=cut.ckpt"], "'cut.ckpt' is no checkpoint, or was cut short"),
    "text": (["--ckpt_path=text.ckpt"], "'text.ckpt' is no checkpoint, or was cut short"),
    "a folder": (["--ckpt_path=runs"], "there is no file 'runs'"),
    "none there": (["--trainer.logger.save_dir=other", "--ckpt_path=best"], "no run in 'other/digits' has a checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_changes(what, command, folder, capsys):
    settings, says = REFUSED[what]
    before = contents(folder)
    with pytest.raises(SystemExit) as end:
        main(["digits", command, *settings, QUIET])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ckpt_path: ")
    assert says in err.splitlines()[-1]
    assert contents(folder) == before


def test_what_the_optimizer_refuses_takes_one_line_as_well(folder, capsys):
    """It is asked last, when the run's folder has a file of events; its config stays."""
    shutil.copy("another_optimizer.ckpt", LAST)
    before = contents(folder)
    with pytest.raises(SystemExit) as end:
        main(["digits", f"--ckpt_path={LAST}", "--trainer.max_epochs=9", QUIET])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ckpt_path: ValueError: loaded state dict contains a parameter group")
    after = contents(folder)
    assert {file: after[file] for file in before} == before


def test_best_and_last_of_the_newest_run(folder, capsys, caplog):
    main(["digits", "test", "--ckpt_path=best", QUIET])
    out, err = capsys.readouterr()
    assert "accuracy/test" in out
    assert "not trained" not in err
    assert "runs/digits/version_0/checkpoints/best.ckpt" in caplog.text
    main(["digits", "--ckpt_path=last", QUIET])
    assert (
        "warning: no step was made: the checkpoint has all 51; --trainer.max_epochs allows more"
        in capsys.readouterr().err
    )
    assert [run.name for run in (folder / "runs/digits").iterdir()] == ["version_0"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_without_a_checkpoint_the_figures_are_those_of_an_untrained_net(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["digits", command, QUIET])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "warning: no --ckpt_path: these are the figures of a net that was not trained"


def test_last_is_the_last_epoch_and_best_the_best(tmp_path, monkeypatch):
    """A learning rate of 0 does not improve on the first epoch."""
    monkeypatch.chdir(tmp_path)
    main(["digits", *BRIEF, "--trainer.max_epochs=3", "--optimizer.lr=0", QUIET])
    steps = {
        file.stem: torch.load(file, weights_only=True)["global_step"]
        for file in (tmp_path / "runs/digits/version_0/checkpoints").iterdir()
    }
    assert steps == {"best": 4, "last": 12}
    main(["digits", "--ckpt_path=best", "--trainer.max_epochs=2", QUIET])
    assert sorted(file.name for file in tmp_path.rglob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


def test_a_run_that_was_killed_before_it_saved(folder, capsys):
    """``last`` is not that of the run before, which would pass for this one."""
    run = folder / "runs/digits/version_1"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    with pytest.raises(SystemExit):
        main(["digits", "--ckpt_path=last", QUIET])
    says = "error: ckpt_path: the newest run, 'runs/digits/version_1', ended before it saved a checkpoint: leave ckpt_path "
    assert capsys.readouterr().err.splitlines()[-1].startswith(says)
