"""Finds and loads the kernel library, once, at first use. Nothing here raises: without kernels there is pure PyTorch."""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import torch

from torchcalc.native import build

__all__ = ["available", "library", "why_not"]

_REBUILD = "Run `python -m torchcalc build`."

_lock = threading.Lock()
_library: Path | None = None
_why_not = ""
_tried = False
_forked = False


def available() -> bool:
    """Whether the kernels are loaded; the first call loads them."""
    if not _tried:
        _load_once()
    return _library is not None


def why_not() -> str:
    """Why the kernels are not loaded and what to do about it; empty if they are."""
    if not _tried:
        _load_once()
    return _why_not


def library() -> Path | None:
    """The file that the kernels were loaded from."""
    return _library if available() else None


def _load_once() -> None:
    global _library, _tried, _why_not
    with _lock:
        if _tried:
            return
        try:
            _library, _why_not = _load()
        except Exception as error:  # a broken file system, or a platform that nobody has tried
            _library, _why_not = None, f"{type(error).__name__} while looking for the kernels: {error}"
        _tried = True


def _load() -> tuple[Path | None, str]:
    if os.environ.get("TORCHCALC_NATIVE") == "0":
        return None, "switched off by TORCHCALC_NATIVE=0 in the environment. Unset it to use the kernels."
    path, problem = _find()
    if path is None:
        return None, problem
    if not _is_whole(path):
        return None, f"{path} is damaged: it was cut short. {_REBUILD}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return None, f"{path} does not load into torch {torch.__version__}: {error}. {_REBUILD}"
    if _forked:
        torch.ops.torchcalc.run_serially()
        torch.set_num_threads(1)
    return path, ""


def _is_whole(path: Path) -> bool:
    """Whether an ELF file reaches to the end of its section table: mapping one that was cut short ends the process."""
    with path.open("rb") as file:
        library = file.read(64)  # the header
    if library[:5] != b"\x7fELF\x02":
        return True  # a Mach-O file, say; what is no library at all is refused by the loader
    if len(library) < 64:
        return False
    order = "<" if library[5] == 1 else ">"
    (table,) = struct.unpack_from(f"{order}Q", library, 40)
    size, count = struct.unpack_from(f"{order}HH", library, 58)
    return bool(table + size * count <= path.stat().st_size)


def _find() -> tuple[Path | None, str]:
    if wanted := os.environ.get("TORCHCALC_NATIVE_LIBRARY"):
        path = Path(wanted)
        if not path.is_file():
            return None, f"TORCHCALC_NATIVE_LIBRARY={wanted} is not a file. Unset it, or name a library built here."
        if f"torchcalc-source-hash:{build.source_hash()}".encode() not in path.read_bytes():
            return None, f"TORCHCALC_NATIVE_LIBRARY={wanted} was built from other sources than these. Build it again."
        return path, ""
    places, name = build.directories(), build.library_name()
    for directory in places:
        if (directory / name).is_file():
            return directory / name, ""
    for directory in places:
        for stale in directory.glob("libtorchcalc-*"):
            return None, f"{stale} was built from other sources, or for another platform. {_REBUILD}"
    return None, f"they are not built: there is no {name} in {' or '.join(map(str, places))}. {_REBUILD}"


def _note_fork() -> None:
    # A forked child has none of torch's pool threads, and OpenMP would wait for them for ever. A library that is already
    # loaded notices by itself; one that the child loads later is told. torch itself, which makes the state at a first
    # step, is told as DataLoader's workers tell it.
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()  # another thread of the parent may have held it
    if _library is not None:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
