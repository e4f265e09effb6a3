"""What the kernel libraries are called, where they lie, and which of them may be loaded.

libtorchcalc-<csrc>-<loops>-<platform>.so               the kernels
libtorchcalc_nodes-<csrc>-torch<version>-<platform>.so  autograd's nodes

Both carry a hash of what they were built from: what was built from other sources is never loaded. The loops that were generated
from the formulas have a hash of their own, which the runtime does not ask for: each loop knows the formula that it was made
from, and is compared with it. Beside each library lies a file with the hash of its content.

The build hook imports this before torchcalc can be imported: it needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["damage", "danger", "directories", "library_name", "node_hash", "nodes_name", "pattern", "source_hash"]

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE / "csrc"
NODES = SOURCES / "node"
OLDEST_TORCH = (2, 10)

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",  # sqrt is the instruction
    "-fno-trapping-math",  # both sides of a select may be computed
    "-ffp-contract=off",  # a·b + c is rounded twice unless the source says fma: results do not depend on the compiler
    "-Wall",
    "-Wextra",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000ULL",
]
#: Of loops that are generated, where the compiler has them: GCC does, Clang needs none of them.
LOOP_FLAGS = [
    # Both make control flow of our selects, or selects of truth values, and GCC then leaves the loop scalar.
    "-fno-tree-pre",
    "-fno-thread-jumps",
    "-fschedule-insns",  # a function is one long chain: two elements' instructions between each other run side by side
    "-fsched-pressure",
    "--param=vect-epilogues-nomask=0",  # a few numbers at the end of a block are not worth a second vector loop
]
NODE_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def _hash(flags: list[str], files: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256(repr(flags).encode())
    for name, content in sorted(files):
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:16]


def source_hash() -> str:
    """Identifies what the kernels are built from, generated loops left aside: csrc and the compiler's options.

    >>> len(source_hash())
    16
    """
    files = [path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h")]
    return _hash([*FLAGS, *LOOP_FLAGS], ((path.name, path.read_bytes()) for path in files))


def node_hash() -> str:
    """The same of the nodes: csrc/node, what it includes from csrc, and the compiler's options."""
    found: dict[Path, bytes] = {}
    new = [path for path in NODES.iterdir() if path.suffix in (".cpp", ".h")]
    while new:
        path = new.pop()
        found[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', found[path], flags=re.MULTILINE):
            for folder in (path.parent, SOURCES):  # as the compiler looks for it
                header = (folder / name.decode()).resolve()
                if header.is_file() and header not in found:
                    new.append(header)
    return _hash(NODE_FLAGS, ((os.path.relpath(path, SOURCES), content) for path, content in found.items()))


def platform() -> str:
    """How all names end on this platform."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return re.sub(r"\W", "_", sysconfig.get_platform()) + suffix


def pattern() -> str:
    """What libraries of these sources are called on this platform, whatever formulas they were generated from."""
    return f"libtorchcalc-{source_hash()}-*-{platform()}"


def library_name(generated: dict[str, str]) -> str:
    """The library's file name with these generated files."""
    return pattern().replace("*", _hash([], ((name, text.encode()) for name, text in generated.items())))


def nodes_name(torch_version: str) -> str:
    """The file name of the nodes for that torch and this Python."""
    version = re.sub(r"[^\w.]", "_", torch_version)
    python = (sys.implementation.cache_tag or "unknown").replace("-", "")
    return f"libtorchcalc_nodes-{node_hash()}-torch{version}-{python}-{platform()}"


def directories() -> list[Path]:
    """Where the library may lie, in this order: the installed package, then the user's cache."""
    home = Path(os.path.expanduser("~"))
    cache = Path(
        os.environ.get("XDG_CACHE_HOME") or home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    )
    return [PACKAGE, *([cache / "torchcalc"] if cache.is_absolute() else [])]  # without a home "~" stays "~"


def danger(path: Path) -> str:
    """Why a library in this file or directory could be a stranger's, and what to do about it; empty if it could not.

    Loading a library runs its code. In the package it must be as hard to replace as the Python beside it; elsewhere nobody
    but the user and root may own it, write to it, or put another directory in its directory's place.
    """
    if not hasattr(os, "getuid"):
        return ""
    status, own = path.stat(), Path(__file__).stat()
    inside = PACKAGE in (path, path.parent)
    if status.st_uid not in {os.getuid(), 0, *([own.st_uid] if inside else [])}:
        return (
            f"{path} belongs to another user (uid {status.st_uid}). "
            "Remove it, or set XDG_CACHE_HOME to a directory of yours."
        )
    forbidden = stat.S_IWOTH & ~own.st_mode if inside else stat.S_IWOTH | stat.S_IWGRP
    open_to_all = [path] if status.st_mode & forbidden else []
    if not inside:  # in a sticky directory, as /tmp is, others cannot rename what is ours
        modes = {parent: parent.stat().st_mode for parent in path.resolve().parents}
        open_to_all += [p for p, mode in modes.items() if mode & stat.S_IWOTH and not mode & stat.S_ISVTX]
    for place in open_to_all:
        mode = f"{place.stat().st_mode & 0o7777:o}"
        return f"{place} can be written by others than you (mode {mode}). Run `chmod go-w {shlex.quote(str(place))}`."
    return ""


def hash_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def damage(library: Path) -> str:
    """What is wrong with the library's content; empty if it is what the build wrote.

    Mapping a file that was cut short would end the process.
    """
    try:
        expected = hash_file(library).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return f"{hash_file(library)} cannot be read, which holds the hash of the library's content"
    if hashlib.sha256(library.read_bytes()).hexdigest() != expected:
        return f"{library} is damaged: its content is not what the build has written"
    return ""


def publish(content: bytes, path: Path, mode: int = 0o644) -> None:
    """Written under another name and renamed: whoever looks, or has the old file mapped, sees either file whole."""
    handle, name = tempfile.mkstemp(prefix=".libtorchcalc-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
