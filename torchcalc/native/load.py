"""Finds and loads the libraries, once, at first use. Nothing here raises: without kernels there is pure PyTorch."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch.nn import Parameter

from torchcalc.native import files

__all__ = ["available", "library", "nodes", "warn_once", "why_no_nodes", "why_not"]

_REBUILD = "Run `python -m torchcalc build`."
_SWITCH = {
    **dict.fromkeys(["", "1", "true", "on", "yes"], True),
    **dict.fromkeys(["0", "false", "off", "no"], False),
}
_ISAS = ("avx512", "avx2", "baseline", "neon")


class _Loaded(NamedTuple):
    """What became of the two libraries; the reasons are empty where they are loaded."""

    kernels: Path | None
    why_not: str
    nodes: ModuleType | None
    why_no_nodes: str
    intended: bool = False  # somebody has switched the kernels off, or there are none for this system


_lock = threading.Lock()
_loaded: _Loaded | None = None
_warned = False
_forked = False


def available() -> bool:
    """Whether the kernels are loaded; the first call loads them."""
    return (_loaded or _load_once()).kernels is not None


def why_not() -> str:
    """Why the kernels are not loaded and what to do about it; empty if they are."""
    return (_loaded or _load_once()).why_not


def library() -> Path | None:
    """The file that the kernels were loaded from."""
    return (_loaded or _load_once()).kernels


def nodes() -> ModuleType | None:
    """The module of autograd's nodes, for the running torch; None without it, and then functions run without kernels."""
    return (_loaded or _load_once()).nodes


def why_no_nodes() -> str:
    """Why they are not loaded and what to do about it; empty if they are."""
    return (_loaded or _load_once()).why_no_nodes


def warn_once(tensors: Iterable[Any], nodes: bool = False) -> Literal[False]:
    """Says once in a process that kernels are not there, and the remedy. For where these tensors would have met one.

    Says nothing where kernels were switched off or cannot be built, nor of tensors that they would not have taken.

    Args:
        tensors: what would have been handed to the kernel.
        nodes: whether autograd's nodes were needed as well.
    """
    global _warned
    loaded = _loaded or _load_once()
    why = loaded.why_not or (loaded.why_no_nodes if nodes else "")
    if _warned or loaded.intended or not why or not all(map(_would_be_taken, tensors)):
        return False
    if _are_functorch_transforms_active() or _len_torch_dispatch_stack():
        return False
    from torchcalc.optim.checks import level_of_caller

    _warned = True
    what = "its CPU kernels" if loaded.why_not else "autograd's nodes, and so without CPU kernels for functions"
    text = f"torchcalc runs without {what}, which are several times as fast as what it does now: {why}"
    warnings.warn(text, RuntimeWarning, stacklevel=level_of_caller())
    return False


def _would_be_taken(x: Any) -> bool:
    return type(x) in (Tensor, Parameter) and x.is_cpu and x.is_floating_point() and x.layout == torch.strided


def _load_once() -> _Loaded:
    global _loaded
    with _lock:
        if _loaded is None:
            try:
                _loaded = _load()
            except Exception as error:  # a broken file system, or a platform that nobody has tried
                why = f"{type(error).__name__} while looking for the kernels: {error}"
                _loaded = _Loaded(None, why, None, why)
        return _loaded


def _load() -> _Loaded:
    switch, isa = os.environ.get("TORCHCALC_NATIVE", ""), os.environ.get("TORCHCALC_NATIVE_ISA", "")
    if switch.lower() not in _SWITCH:
        why = f"TORCHCALC_NATIVE={switch} is neither 0, false, off, no nor 1, true, on, yes. Set one of these, or unset it."
        return _Loaded(None, why, None, why)
    if not _SWITCH[switch.lower()]:
        why = f"switched off by TORCHCALC_NATIVE={switch} in the environment. Unset it to use the kernels."
        return _Loaded(None, why, None, why, intended=True)
    if isa and isa not in _ISAS:
        why = f"TORCHCALC_NATIVE_ISA={isa} is none of {', '.join(_ISAS)}. Set one of these, or unset it."
        return _Loaded(None, why, None, why)
    kernels, why_not = _load_file(*_find_kernels())
    if kernels is None:
        return _Loaded(None, why_not, None, "the kernels are not loaded", intended=sys.platform == "win32")
    if _forked:
        torch.ops.torchcalc.run_serially()
        torch.set_num_threads(1)
    return _Loaded(kernels, "", *_import_nodes(*_find_nodes(kernels)))


def _load_file(path: Path | None, problem: str) -> tuple[Path | None, str]:
    if path is None:
        return None, problem
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return None, f"{path} does not load into torch {torch.__version__}: {error.__cause__ or error}. {_REBUILD}"
    return path, ""


def _import_nodes(path: Path | None, problem: str) -> tuple[ModuleType | None, str]:
    if path is None:
        return None, problem
    loader = ExtensionFileLoader("torchcalc_nodes", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        module = module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, RuntimeError) as error:
        return None, f"{path} does not load into torch {torch.__version__}: {error}. {_REBUILD}"
    return module, ""


def _find_kernels() -> tuple[Path | None, str]:
    if wanted := os.environ.get("TORCHCALC_NATIVE_LIBRARY"):
        named = Path(wanted)
        if not named.is_file():
            return None, f"TORCHCALC_NATIVE_LIBRARY={wanted} is not a file. Unset it, or name a library built here."
        if f"torchcalc-source-hash:{files.source_hash()}".encode() not in named.read_bytes():
            return None, f"TORCHCALC_NATIVE_LIBRARY={wanted} was built from other sources than these. Build it again."
        if files.hash_file(named).exists() and (damage := files.damage(named)):
            return None, f"{damage}. Build it again."
        return named, ""
    places, name = files.directories(), files.pattern()
    path, problem = _first_good(places, name)
    if path or problem:
        return path, problem
    for directory in places:
        for stale in directory.glob("libtorchcalc-*"):
            return None, f"{stale} was built from other sources, or for another platform. {_REBUILD}"
    return None, f"they are not built: there is no {name} in {' or '.join(map(str, places))}. {_REBUILD}"


def _find_nodes(kernels: Path) -> tuple[Path | None, str]:
    named = "TORCHCALC_NATIVE_LIBRARY" in os.environ
    places, name = [kernels.parent] if named else files.directories(), files.nodes_name(torch.__version__)
    path, problem = _first_good(places, name)
    if path or problem:
        return path, problem
    return None, f"they are not built for this torch: there is no {name} in {' or '.join(map(str, places))}. {_REBUILD}"


def _first_good(places: list[Path], pattern: str) -> tuple[Path | None, str]:
    """The newest such file of the first place that has one, if it is ours and whole; or else what is wrong with it."""
    problem = ""
    for directory in places:
        for path in sorted(directory.glob(pattern), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            trouble = files.danger(directory) or files.danger(path)
            if not trouble and (damage := files.damage(path)):
                trouble = f"{damage}. {_REBUILD}"
            if not trouble:
                return path, ""
            problem = problem or trouble
    return None, problem


def _note_fork() -> None:
    # A forked child has none of torch's pool threads, and OpenMP would wait for them for ever. A library that is already
    # loaded notices by itself; one that the child loads later is told. torch itself, which makes the state at a first
    # step, is told as DataLoader's workers tell it.
    global _forked, _lock
    _forked = True
    _lock = threading.Lock()  # another thread of the parent may have held it
    if _loaded is not None and _loaded.kernels is not None:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
