"""Compiles csrc/*.cpp into one shared library against torch's stable ABI:  python -m torchcalc build

The library holds no Python and links only to libtorch_cpu, so one build serves every Python and every torch >= 2.10 on the
same kind of machine. It lies beside this file, or in the user's cache directory where that is not writable, under a name
that carries the hash of the sources and the platform: what was built from other sources is never loaded.

The build hook loads this file by its path, before torchcalc can be imported: it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["BuildError", "build", "directories", "library_name", "source_hash"]

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE / "csrc"
OLDEST_TORCH = (2, 10)

_FLAGS = [
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
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildError(Exception):
    """The kernels cannot be built here. The message says why, and what to do about it."""


def source_hash() -> str:
    """Identifies what the library is built from: all of csrc and the compiler's options.

    >>> len(source_hash())
    16
    """
    digest = hashlib.sha256(repr(_FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def library_name() -> str:
    """The file name of an up-to-date library on this platform."""
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return f"libtorchcalc-{source_hash()}-{platform}{suffix}"


def directories() -> list[Path]:
    """Where the library may lie, in this order: the installed package, then the user's cache."""
    home = Path(os.path.expanduser("~"))
    cache = Path(
        os.environ.get("XDG_CACHE_HOME") or home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    )
    return [PACKAGE, *([cache / "torchcalc"] if cache.is_absolute() else [])]  # without a home "~" stays "~"


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first of c++, g++, clang++ that is there."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError(
        "no C++ compiler found: neither $CXX nor c++, g++ or clang++ on the PATH. "
        "Install one (Debian: apt install g++; macOS: xcode-select --install), then run `python -m torchcalc build`."
    )


def torch_directory() -> Path:
    """The directory of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch is not installed in this environment (pip hides it while it builds, unless --no-build-isolation "
            "is given). Run `python -m torchcalc build` where torch is installed."
        )
    directory = Path(next(iter(spec.submodule_search_locations)))
    file = directory / "version.py"  # missing in what a failed uninstallation has left
    version = re.search(r"__version__ = '(\d+)\.(\d+)", file.read_text() if file.is_file() else "")
    if version and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        raise BuildError(
            f"torch {version[1]}.{version[2]} has no stable ABI to build against; "
            f"install torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}."
        )
    if not (directory / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise BuildError(f"the torch in {directory} came without its C++ headers; reinstall it from a wheel.")
    return directory


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run ({error}); set $CXX to a C++17 compiler.") from error
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        errors = [line for line in lines if "error" in line] or lines[-5:]
        raise BuildError(
            f"{command[0]} failed (exit status {result.returncode}); a C++17 compiler is needed, $CXX names another one.\n"
            f"  {shlex.join(command)}\n  " + "\n  ".join(errors[:5])
        )


def _compile(target: Path, sanitize: bool) -> None:
    cxx, torch = compiler(), torch_directory()
    flags = [*_FLAGS, *(_SANITIZERS if sanitize else [])]
    define = f'-DTORCHCALC_SOURCE_HASH="{source_hash()}"'
    include = ["-isystem", str(torch / "include"), "-I", str(SOURCES)]
    with tempfile.TemporaryDirectory(prefix="torchcalc-build-") as directory:
        code = "import sys, pathlib; from torchcalc.formula.generate import sources\n" + (
            "for name, text in sources().items(): pathlib.Path(sys.argv[1], name).write_text(text)"
        )
        subprocess.run(
            [sys.executable, "-c", code, directory],
            check=True,
            env={**os.environ, "PYTHONPATH": str(PACKAGE.parent.parent)},
        )
        files = [*Path(directory).glob("*.cpp"), *SOURCES.glob("*.cpp")]
        objects = {path: Path(directory, path.stem + ".o") for path in sorted(files)}
        jobs = [[*cxx, *flags, define, *include, "-c", str(path), "-o", str(to)] for path, to in objects.items()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, jobs))
        if sys.platform == "darwin":  # torch's library has an @rpath name, and is loaded before ours
            link = ["-dynamiclib", "-undefined", "dynamic_lookup"]
        else:
            link = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu", "-pthread"]
        sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
        _run([*cxx, *map(str, objects.values()), "-o", str(target), *sanitizers, *link])


def _writable(places: list[Path]) -> Path:
    for directory in places:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(directory, os.W_OK):
            return directory
    raise BuildError(
        f"cannot write to {' nor to '.join(map(str, places))}; set XDG_CACHE_HOME to a directory that is writable."
    )


def build(output: Path | None = None, *, sanitize: bool = False) -> Path:
    """Compiles the kernels and returns the library's path.

    Args:
        output: the directory to build into. By default the package's own, or the user's cache where that is not writable.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, for tests. Needs an `output`: such a library only
            loads into a process that preloads the sanitizers' runtime.

    Raises:
        BuildError: no compiler, no torch, no writable directory, or the compiler failed.
    """
    if sys.platform == "win32":
        raise BuildError("the kernels are not built on Windows; torchcalc runs in pure PyTorch there.")
    if sanitize and output is None:
        raise ValueError(
            "build(sanitize=True) needs output=: a sanitized library must not take the ordinary one's place"
        )
    directory = _writable([output] if output else directories())
    library = directory / library_name()
    # Compiled under another name and renamed: a build beside this one, or a process that has the old file mapped, sees
    # either file whole.
    handle, name = tempfile.mkstemp(prefix=".libtorchcalc-", suffix=".tmp", dir=directory)
    os.close(handle)
    try:
        _compile(Path(name), sanitize)
        os.chmod(name, 0o755)
        os.replace(name, library)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if directory == PACKAGE:  # elsewhere other versions may have theirs
        for stale in directory.glob("libtorchcalc-*"):
            if stale != library and _platform_of(stale) == _platform_of(library):
                stale.unlink(missing_ok=True)
    return library


def _platform_of(library: Path) -> str:
    return library.name.split("-")[-1]
