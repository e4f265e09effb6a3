"""Compiles the kernels into shared libraries:  python -m torchcalc build

libtorchcalc        csrc/*.cpp, and the loops that torchcalc.formula.generate writes from the formulas. It holds no Python and
                    uses torch's stable ABI only, so that one build serves every Python and every torch >= 2.10 on the same
                    kind of machine.
libtorchcalc_nodes  csrc/node/*.cpp: autograd's nodes, a Python module against torch's ordinary C++ headers. It serves the
                    one version of torch and of Python that it was built with, and nothing but speed is lost without it.

They lie beside this file, or in the user's cache directory where that is not writable. Their names carry a hash of the
sources and the platform: what was built from other sources is never loaded. The generated loops are hashed apart, for each of
them knows the formula that it was made from, and the runtime compares them one by one.

The build hook loads this file by its path, before torchcalc can be imported: it imports the standard library alone.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import site
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["BuildError", "build", "damage", "danger", "directories", "nodes_name", "pattern", "source_hash"]

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE / "csrc"
NODES = SOURCES / "node"
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
_NODE_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildError(Exception):
    """The kernels cannot be built here. The message says why, and what to do about it."""


# --- names ------------------------------------------------------------------------------------------------------------


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
    return _hash(_FLAGS, ((path.name, path.read_bytes()) for path in files))


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
    return _hash(_NODE_FLAGS, ((os.path.relpath(path, SOURCES), content) for path, content in found.items()))


def _platform() -> str:
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return re.sub(r"\W", "_", sysconfig.get_platform()) + suffix


def pattern() -> str:
    """What libraries of these sources are called on this platform, whatever formulas they were generated from."""
    return f"libtorchcalc-{source_hash()}-*-{_platform()}"


def library_name(generated: dict[str, str]) -> str:
    """The library's file name with these generated files."""
    return pattern().replace("*", _hash([], ((name, text.encode()) for name, text in generated.items())))


def nodes_name(torch_version: str) -> str:
    """The file name of the nodes for that torch and this Python."""
    version = re.sub(r"[^\w.]", "_", torch_version)
    python = (sys.implementation.cache_tag or "unknown").replace("-", "")
    return f"libtorchcalc_nodes-{node_hash()}-torch{version}-{python}-{_platform()}"


# --- places -----------------------------------------------------------------------------------------------------------


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
    but the user and root may own it, or write to it.
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
    if status.st_mode & forbidden:
        mode = f"{status.st_mode & 0o7777:o}"
        return f"{path} can be written by others than you (mode {mode}). Run `chmod go-w {shlex.quote(str(path))}`."
    return ""


def _hash_file(library: Path) -> Path:
    return library.with_name(library.name + ".sha256")


def damage(library: Path) -> str:
    """What is wrong with the library's content; empty if it is what the build wrote.

    Mapping a file that was cut short would end the process.
    """
    try:
        expected = _hash_file(library).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return f"{_hash_file(library)} cannot be read, which holds the hash of the library's content"
    if hashlib.sha256(library.read_bytes()).hexdigest() != expected:
        return f"{library} is damaged: its content is not what the build has written"
    return ""


def _writable(places: list[Path], remedy: str, refused: Callable[[Path], str] = danger) -> Path:
    reasons = []
    for directory in places:
        try:
            directory.mkdir(mode=0o755 if directory == PACKAGE else 0o700, parents=True, exist_ok=True)
        except OSError as error:
            reasons.append(f"cannot write to {directory} ({error.strerror})")
            continue
        if not os.access(directory, os.W_OK):
            reasons.append(f"cannot write to {directory}")
        elif problem := refused(directory):
            reasons.append(problem.rstrip("."))
        else:
            return directory
    raise BuildError(f"{'; '.join(reasons)}; {remedy}.")


# --- running commands -------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    command: list[str]
    optional: bool = False
    environment: dict[str, str] | None = None


class _Failed(Exception):
    """A command failed."""

    def __init__(self, command: list[str], status: int, output: str) -> None:
        super().__init__(command, status, output)
        self.command, self.status, self.output = command, status, output


# Signals that came while a build runs. It looks where it waits, and stops there: an exception out of a signal handler
# could come between the start of a process and the note that it runs.
_signals: list[int] = []


def _stop_if_told() -> None:
    if _signals:
        raise KeyboardInterrupt if _signals[0] == signal.SIGINT else SystemExit(128 + _signals[0])


@contextlib.contextmanager
def _cleaning_up() -> Iterator[None]:
    """A build that is told to stop, by Ctrl-C, SIGTERM or SIGHUP, first removes what it has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    unhandled = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ours = {number: handler for number, handler in before.items() if handler in unhandled}
    _signals.clear()
    for number in ours:
        signal.signal(number, lambda number, _: _signals.append(number))
    try:
        yield
        _stop_if_told()
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        _signals.clear()


def _run(jobs: list[_Job], work: Path) -> _Failed | None:
    """Runs commands in that directory, one on each processor at a time.

    Returns the failure of an optional one; raises another's.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting, failed = list(enumerate(jobs))[::-1], None
    running: dict[subprocess.Popen[bytes], tuple[_Job, Path]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processors:
                number, job = waiting.pop()
                if job.optional and failed:
                    continue
                log = work / f"{number}.log"
                # What a compiler leaves behind goes with our directory, and its children end with it.
                environment = {**os.environ, "TMPDIR": str(work), **(job.environment or {})}
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        job.command, stdout=file, stderr=file, cwd=work, env=environment, start_new_session=True
                    )
                running[process] = job, log
            time.sleep(0.02)
            _stop_if_told()
            for process in [process for process in running if process.poll() is not None]:
                job, log = running.pop(process)
                if process.returncode != 0:
                    failed = _Failed(job.command, process.returncode, log.read_text(errors="replace"))
                    if not job.optional:
                        raise failed
    finally:
        for process in running:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    return failed


# --- tools ------------------------------------------------------------------------------------------------------------


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
    """The directory of the installed torch, without importing it.

    While pip builds, it hides what is installed from `import`, and not where this Python keeps it.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    paths = sysconfig.get_paths()
    for packages in (paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()):
        places.append(Path(packages, "torch"))
    # version.py is missing in what a failed uninstallation has left.
    directory = next((place for place in places if (place / "version.py").is_file()), None)
    if directory is None:
        raise BuildError(
            "torch is not installed in this environment. Install it, then run `python -m torchcalc build`."
        )
    version = re.match(r"(\d+)\.(\d+)", torch_version(directory))
    if version and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        raise BuildError(
            f"torch {version[1]}.{version[2]} has no stable ABI to build against; "
            f"install torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}."
        )
    if not (directory / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
        raise BuildError(f"the torch in {directory} came without its C++ headers; reinstall it from a wheel.")
    return directory


def torch_version(directory: Path) -> str:
    """What torch.__version__ is there."""
    version = re.search(r"^__version__ = '([^']+)'", (directory / "version.py").read_text(), flags=re.MULTILINE)
    return version[1] if version else "unknown"


_GENERATE = """
import json, sys
from pathlib import Path
sys.path += sys.argv[2:]
from torchcalc.formula.generate import sources
Path(sys.argv[1]).write_text(json.dumps(sources()), encoding="utf-8")
"""


def generate(work: Path) -> dict[str, str]:
    """The C++ files that are written from the formulas, by name. A Python of its own imports torch for it."""
    elsewhere = [str(torch_directory().parent), *sys.path]  # what torch needs lies beside it, or where we see it
    result = work / "generated.json"
    command = [sys.executable, "-P", "-c", _GENERATE, str(result), *elsewhere]
    environment = {"PYTHONPATH": str(PACKAGE.parents[1]), "TORCHCALC_NATIVE": "0"}
    try:
        _run([_Job(command, environment=environment)], work)
    except _Failed as failure:
        last = (failure.output.strip().splitlines() or ["no message"])[-1]
        raise BuildError(f"no loops could be generated from the formulas in {PACKAGE.parent}: {last}") from failure
    texts: dict[str, str] = json.loads(result.read_text(encoding="utf-8"))
    return texts


# --- compiling --------------------------------------------------------------------------------------------------------


def _why(failed: _Failed) -> str:
    lines = failed.output.strip().splitlines()
    errors = [line for line in lines if "error" in line] or lines[-5:]
    standard = next((flag[len("-std=c++") :] for flag in failed.command if flag.startswith("-std=")), "17")
    return (
        f"{failed.command[0]} failed (exit status {failed.status}); "
        f"a C++{standard} compiler is needed, $CXX names another one.\n"
        f"  {shlex.join(failed.command)}\n  " + "\n  ".join(errors[:5])
    )


def _compile(kernels: Path | None, nodes: Path | None, generated: dict[str, str], sanitize: bool, work: Path) -> str:
    """Writes the libraries that are given; returns why the nodes could not be built, or an empty string."""
    cxx, torch = compiler(), torch_directory()
    sanitizers = _SANITIZERS if sanitize else []
    include = ["-I", str(SOURCES), "-isystem", str(torch / "include")]
    compiling: list[_Job] = []
    objects: dict[Path, list[str]] = {}

    def add(library: Path, files: Iterable[Path], flags: list[str]) -> None:
        for path in files:
            objects.setdefault(library, []).append(f"{path.parent.name}-{path.stem}.o")
            command = [*cxx, *flags, "-c", str(path), "-o", objects[library][-1]]
            compiling.append(_Job(command, optional=library == nodes))

    # The longest first, so that no processor waits for one at the end: torch's headers take 20 s, else the length tells.
    if nodes:
        api = str(torch / "include" / "torch" / "csrc" / "api" / "include")
        python = sysconfig.get_paths()["include"]
        add(nodes, sorted(NODES.glob("*.cpp")), [*_NODE_FLAGS, *include, "-isystem", api, "-isystem", python])
    if kernels:
        (work / "generated").mkdir()
        for name, text in generated.items():
            (work / "generated" / name).write_text(text, encoding="utf-8")
        files = [*SOURCES.glob("*.cpp"), *(Path("generated", name) for name in generated if name.endswith(".cpp"))]
        files.sort(key=lambda path: (-(work / path).stat().st_size, path))
        add(kernels, files, [*_FLAGS, *sanitizers, f'-DTORCHCALC_SOURCE_HASH="{source_hash()}"', *include])
    if sys.platform == "darwin":  # torch's libraries have @rpath names, and are loaded before ours
        link = ["-dynamiclib", "-undefined", "dynamic_lookup"]
    else:
        link = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu", "-pthread"]
    try:
        failed = _run(compiling, work)
        linking = []
        for library in objects:
            if library == nodes and failed:
                continue
            command = [*cxx, *sorted(objects[library]), "-o", str(library), *sanitizers[:1], *link]
            if library == nodes and sys.platform != "darwin":
                command += ["-ltorch_python", "-lc10"]
            linking.append(_Job(command, optional=library == nodes))
        failed = _run(linking, work) or failed
    except OSError as error:
        raise BuildError(f"{cxx[0]} could not be run ({error}); set $CXX to a C++17 compiler.") from error
    except _Failed as error:
        raise BuildError(_why(error)) from error
    return _why(failed) if failed else ""


def _publish(content: bytes, path: Path, mode: int = 0o644) -> None:
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


def _install(built: Path, library: Path) -> None:
    content = built.read_bytes()
    _publish(hashlib.sha256(content).hexdigest().encode() + b"\n", _hash_file(library))  # first: no library without it
    _publish(content, library, 0o755)


def _remove_stale(kernels: Path) -> None:
    """Removes from the package what no torch will load any more. Nodes for another torch stay."""
    for path in PACKAGE.glob("libtorchcalc*"):
        library = path.with_suffix("") if path.suffix == ".sha256" else path
        current = library == kernels or library.name.startswith(f"libtorchcalc_nodes-{node_hash()}-")
        if library.name.split("-")[-1] == _platform() and not current:
            path.unlink(missing_ok=True)


def _tell_pip() -> None:
    """Notes the libraries in RECORD, where the package came from a wheel: `pip uninstall` removes what stands there."""
    for record in PACKAGE.parents[1].glob("torchcalc-*.dist-info/RECORD"):
        with record.open(newline="") as file:
            rows = [row for row in csv.reader(file) if not row[:1] or "/libtorchcalc" not in row[0]]
        for path in sorted(PACKAGE.glob("libtorchcalc*")):
            digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
            rows.append([path.relative_to(PACKAGE.parents[1]).as_posix(), f"sha256={digest}", str(path.stat().st_size)])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        _publish(text.getvalue().encode(), record, stat.S_IMODE(record.stat().st_mode))


def _say(problem: str) -> None:
    print(f"torchcalc: {problem}", file=sys.stderr)


def build(
    output: Path | None = None, *, sanitize: bool = False, again: bool = True, warn: Callable[[str], object] = _say
) -> Path:
    """Compiles the kernels and the nodes, and returns the path of the kernels' library.

    Args:
        output: the directory to build into. By default the package's own, or the user's cache where that is not writable.
        sanitize: the kernels alone, with AddressSanitizer and UndefinedBehaviorSanitizer, for tests. Needs an `output`:
            such a library only loads into a process that preloads the sanitizers' runtime.
        again: compile also what is there, whole and up to date.
        warn: is told what keeps the nodes from being built, which is no error.

    Raises:
        BuildError: no compiler, no torch, no writable directory, or the compiler failed.
    """
    if sys.platform == "win32":
        raise BuildError("the kernels are not built on Windows; torchcalc runs in pure PyTorch there.")
    if sanitize and output is None:
        raise ValueError(
            "build(sanitize=True) needs output=: a sanitized library must not take the ordinary one's place"
        )
    if output:
        directory = _writable([output.absolute()], "name another directory with --output", lambda _: "")
    else:
        directory = _writable(directories(), "set XDG_CACHE_HOME to a directory that is writable")
    with _cleaning_up(), tempfile.TemporaryDirectory(prefix="torchcalc-build-") as name:
        work = Path(name)
        generated = generate(work)
        kernels = directory / library_name(generated)
        nodes = directory / nodes_name(torch_version(torch_directory()))
        wanted = {
            library: work / library.name
            for library in ([kernels] if sanitize else [kernels, nodes])
            if again or not library.is_file() or damage(library)
        }
        if wanted:
            problem = _compile(wanted.get(kernels), wanted.get(nodes), generated, sanitize, work)
            if problem:
                warn(f"autograd's nodes were not built, and the functions run without kernels: {problem}")
                del wanted[nodes]
        for library, built in wanted.items():
            _install(built, library)
        os.utime(kernels)  # the newest is loaded
        if directory == PACKAGE:  # elsewhere other versions may have theirs
            _remove_stale(kernels)
            _tell_pip()
    return kernels


if __name__ == "__main__":  # for `make`: builds what is missing, and does without a compiler
    try:
        build(again=False)
    except BuildError as error:
        _say(f"the kernels were not built: {error}")
