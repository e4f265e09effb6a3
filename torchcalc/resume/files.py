"""Checkpoints that are there as a whole or not at all.

A file is written under another name in the same folder, and takes its own when every byte is on the disk. POSIX renames
within a folder in one act: whoever dies while writing leaves the old checkpoint and a temporary file, which the next one
overwrites.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["is_complete", "newest", "publish", "save", "temporary"]


def temporary(path: str | os.PathLike[str]) -> Path:
    """The name under which ``path`` is written: in the same folder, and not among ``*.ckpt``."""
    return Path(path).with_name(f".{Path(path).name}.tmp")


def save(content: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` that replaces ``path`` when all is written: at any moment there is the old file or the new one.

    Args:
        content: what torch.save takes; tensors, numbers, strings and containers of them, so that ``weights_only=True``
            loads it.
        path: the file; its folder is made where it is missing.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the old file stays.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
    >>> save({"step": 3}, path)
    >>> is_complete(path), torch.load(path)
    (True, {'step': 3})
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary(path)
    try:
        with open(draft, "wb") as file:
            _write(content, file)
        publish(draft, path)
    except OSError as error:  # writing itself does not say where
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


class _Told:
    """A file that remembers what its disk said, which torch.save replaces by an error of its own."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write(content: Any, file: Any) -> None:
    told = _Told(file)
    try:
        torch.save(content, told)  # type: ignore[arg-type]
    except RuntimeError:
        if told.error is not None:
            raise told.error from None
        raise


def publish(draft: Path, path: str | os.PathLike[str]) -> None:
    """Give a draft, a file or a folder, its name, once its bytes are on the disk."""
    path = Path(path)
    for file in [draft] if draft.is_file() else [each for each in draft.rglob("*") if each.is_file()]:
        _sync(file)
    if draft.is_file() and not path.is_dir():
        os.replace(draft, path)
    else:  # a folder does not replace another in one act: newest() finds the old one in between
        old = path.with_name(f"{path.stem}.old{path.suffix}")
        _remove(old)
        if path.exists():
            os.rename(path, old)
        os.rename(draft, path)
        _remove(old)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be opened there, nor files that are only read be synced
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_complete(path: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` is a checkpoint that was written to its end: of torch.save, or of torch.distributed.checkpoint.

    Both write their table of contents last.

    Args:
        path: a file, or a folder; it need not exist.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
    >>> save([1, 2], path)
    >>> whole = path.read_bytes()
    >>> _ = path.write_bytes(whole[: len(whole) // 2])
    >>> is_complete(path)
    False
    """
    path = Path(path)
    return (path / ".metadata").is_file() if path.is_dir() else zipfile.is_zipfile(path)


def newest(folder: str | os.PathLike[str], pattern: str = "**/*.ckpt") -> Path | None:
    """Return the newest complete checkpoint in ``folder`` whose name fits, or None.

    Args:
        folder: where; it need not exist.
        pattern: as of ``Path.glob``, relative to the folder.

    Returns:
        Its path; by the time of its last change, and by name where that is the same.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save({}, folder / "run_1/last.ckpt")
    >>> _ = (folder / "run_1/cut.ckpt").write_bytes(b"PK")
    >>> newest(folder).name
    'last.ckpt'
    """
    found = [(path.stat().st_mtime, str(path)) for path in Path(folder).glob(pattern) if is_complete(path)]
    return Path(max(found)[1]) if found else None
