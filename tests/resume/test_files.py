"""A checkpoint is there as a whole or not at all."""

import os
from pathlib import Path

import pytest
import torch

from torchcalc.resume import is_complete, newest, save


def test_what_is_saved_loads_with_weights_only(tmp_path):
    content = {"x": torch.arange(3), "n": [1, "two"]}
    save(content, tmp_path / "new/folder/last.ckpt")
    assert torch.load(tmp_path / "new/folder/last.ckpt", weights_only=True)["n"] == [1, "two"]
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_whatever_fails_the_old_file_stays(where, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(1, path)

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch if where == "save" else os, where, fails)
        with pytest.raises(OSError, match=r"No space left on device: '.*last\.ckpt'"):
            save(2, path)
    assert torch.load(path) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_error_of_torch_save_is_its_own(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        save(lambda: None, tmp_path / "last.ckpt")
    assert not [*tmp_path.iterdir()]


def test_the_newest_complete_one(tmp_path):
    assert newest(tmp_path) is None
    for i, name in enumerate(["old.ckpt", "new.ckpt", "cut.ckpt"]):
        save(i, tmp_path / name)
        os.utime(tmp_path / name, (i, i))
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:-30])
    (tmp_path / ".new.ckpt.tmp").write_bytes(b"half")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "pieces.ckpt").mkdir()
    assert newest(tmp_path) == tmp_path / "new.ckpt"
    assert newest(tmp_path, "old*") == tmp_path / "old.ckpt"
    assert [is_complete(tmp_path / name) for name in ("old.ckpt", "cut.ckpt", "pieces.ckpt", "none")] == [
        True,
        False,
        False,
        False,
    ]
    (tmp_path / "pieces.ckpt/.metadata").touch()
    assert is_complete(Path(tmp_path / "pieces.ckpt"))
