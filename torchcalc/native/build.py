"""Compiles the kernels into shared libraries:  python -m torchcalc build

libtorchcalc        csrc/*.cpp, and the loops that torchcalc.formula.generate writes from the formulas. It holds no Python and
                    uses torch's stable ABI only, so that one build serves every Python and every torch >= 2.10 on the same
                    kind of machine.
libtorchcalc_nodes  csrc/node/*.cpp: autograd's nodes, a Python module against torch's ordinary C++ headers. It serves the
                    one version of torch and of Python that it was built with, and nothing but speed is lost without it.

`files` says what they are called and where they lie. What was compiled in a checkout is kept in its build/objects, so that a
changed formula costs the compilation of its own file. The standard library is imported alone: the build hook calls this before
torchcalc can be imported.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import site
import stat
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from torchcalc.native import files
from torchcalc.native.processes import Failed, Job, cleaning_up, run

__all__ = ["BuildError", "build", "build_what_is_missing", "compiler", "torch_directory", "torch_version"]

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


class BuildError(Exception):
    """The kernels cannot be built here. The message says why, and what to do about it."""


def _writable(places: list[Path], remedy: str, refused: Callable[[Path], str]) -> Path:
    reasons = []
    for directory in places:
        try:
            directory.mkdir(mode=0o755 if directory == files.PACKAGE else 0o700, parents=True, exist_ok=True)
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
    if version and (int(version[1]), int(version[2])) < files.OLDEST_TORCH:
        raise BuildError(
            f"torch {version[1]}.{version[2]} has no stable ABI to build against; "
            f"install torch >= {files.OLDEST_TORCH[0]}.{files.OLDEST_TORCH[1]}."
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
    environment = {"PYTHONPATH": str(files.PACKAGE.parents[1]), "TORCHCALC_NATIVE": "0"}
    try:
        run([Job(command, environment=environment)], work)
    except Failed as failure:
        last = (failure.output.strip().splitlines() or ["no message"])[-1]
        raise BuildError(
            f"no loops could be generated from the formulas in {files.PACKAGE.parent}: {last}"
        ) from failure
    texts: dict[str, str] = json.loads(result.read_text(encoding="utf-8"))
    return texts


# --- compiling --------------------------------------------------------------------------------------------------------


def _why(failed: Failed) -> str:
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
    sanitizers = SANITIZERS if sanitize else []
    include = ["-I", str(files.SOURCES), "-isystem", str(torch / "include")]
    compiling: dict[str, Job] = {}  # by the object's name
    objects: dict[Path, list[str]] = {}  # of each library

    loop_flags = files.LOOP_FLAGS if _understands(cxx, files.LOOP_FLAGS, work) else []

    def add(library: Path, sources: Iterable[Path], *flags: str) -> None:
        for path in sources:
            name = f"{path.parent.name}-{path.stem}.o"
            objects.setdefault(library, []).append(name)
            own = loop_flags if path.parent.name == "generated" else []
            if path.stem == "library":  # only where it is asked for: it changes with every source
                own = [f'-DTORCHCALC_SOURCE_HASH="{files.source_hash()}"']
            command = [*cxx, *flags, *own, *include, "-c", str(path), "-o", name]
            compiling[name] = Job(command, optional=library == nodes)

    # The longest first, so that no processor waits for one at the end: torch's headers take 20 s, else the length tells.
    if nodes:
        api = torch / "include" / "torch" / "csrc" / "api" / "include"
        python = sysconfig.get_paths()["include"]
        add(nodes, sorted(files.NODES.glob("*.cpp")), *files.NODE_FLAGS, "-isystem", str(api), "-isystem", python)
    if kernels:
        (work / "generated").mkdir()
        for name, text in generated.items():
            (work / "generated" / name).write_text(text, encoding="utf-8")
        sources = [*files.SOURCES.glob("*.cpp"), *(Path("generated", x) for x in generated if x.endswith(".cpp"))]
        sources.sort(key=lambda path: (-(work / path).stat().st_size, path))
        add(kernels, sources, *files.FLAGS, *sanitizers)
    if sys.platform == "darwin":  # torch's libraries have @rpath names, and are loaded before ours
        link, node_link = ["-dynamiclib", "-undefined", "dynamic_lookup"], []
    else:
        link = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu", "-pthread"]
        node_link = ["-ltorch_python", "-lc10", "-ldl"]
    try:
        failed = _compile_what_changed(compiling, work, _identity(cxx, torch))
        linking = [
            Job(
                [
                    *cxx,
                    *sorted(names),
                    "-o",
                    str(library),
                    *sanitizers[:1],
                    *link,
                    *(node_link if library == nodes else []),
                ],
                optional=library == nodes,
            )
            for library, names in objects.items()
            if not (library == nodes and failed)
        ]
        failed = run(linking, work) or failed
    except OSError as error:
        raise BuildError(f"{cxx[0]} could not be run ({error}); set $CXX to a C++17 compiler.") from error
    except Failed as error:
        raise BuildError(_why(error)) from error
    return _why(failed) if failed else ""


def _understands(cxx: list[str], flags: list[str], work: Path) -> bool:
    """Whether the compiler takes these flags without a word."""
    probe = Job([*cxx, *flags, "-Werror", "-fsyntax-only", "-x", "c++", os.devnull], optional=True)
    try:
        return run([probe], work) is None
    except OSError:  # no such compiler: the build will say so
        return False


def _store() -> Path | None:
    """Where a checkout keeps what was compiled; `make clean` empties it. An installed package keeps nothing."""
    root = files.PACKAGE.parents[1]
    return root / "build" / "objects" if (root / "pyproject.toml").is_file() else None


def _identity(cxx: list[str], torch: Path) -> str:
    """Another compiler and another torch give another text."""
    tools = [Path(path).stat() for path in map(shutil.which, cxx) if path]  # `ccache g++` are two
    return f"{[(tool.st_size, tool.st_mtime_ns) for tool in tools]} {torch} {torch_version(torch)}"


def _compile_what_changed(jobs: dict[str, Job], work: Path, tools: str) -> Failed | None:
    """As `run`, with what is kept from builds of the same texts, headers, options, compiler and torch."""
    store = _store()
    if store is None:
        return run(list(jobs.values()), work)
    common = [tools]
    for folder in (files.SOURCES, files.NODES, work / "generated"):
        common += [f"{path.name}\0{path.read_text(encoding='utf-8')}" for path in sorted(folder.glob("*.h"))]
    kept: dict[str, Path] = {}
    for name, job in jobs.items():
        source = work / job.command[job.command.index("-c") + 1]
        parts = [*common, *job.command, source.read_text(encoding="utf-8")]
        kept[name] = store / (hashlib.sha256("\0\0".join(parts).encode()).hexdigest() + ".o")
    new = {name: job for name, job in jobs.items() if not kept[name].is_file()}
    for name in jobs.keys() - new.keys():
        shutil.copyfile(kept[name], work / name)
        os.utime(kept[name])
    try:
        return run(list(new.values()), work)
    finally:
        store.mkdir(parents=True, exist_ok=True)
        for path in store.iterdir():
            if path.stat().st_mtime < time.time() - 14 * 86400:
                path.unlink(missing_ok=True)
        for name in new:
            if (work / name).is_file():  # a compiler that fails removes its own
                files.publish((work / name).read_bytes(), kept[name])


def _install(built: Path, library: Path) -> None:
    content = built.read_bytes()
    # First the hash: no library is seen without it.
    files.publish(hashlib.sha256(content).hexdigest().encode() + b"\n", files.hash_file(library))
    files.publish(content, library, 0o755)


def _remove_stale(kernels: Path) -> None:
    """Removes from the package what no torch will load any more. Nodes for another torch stay."""
    for path in files.PACKAGE.glob("libtorchcalc*"):
        library = path.with_suffix("") if path.suffix == ".sha256" else path
        current = library == kernels or library.name.startswith(f"libtorchcalc_nodes-{files.node_hash()}-")
        if library.name.split("-")[-1] == files.platform() and not current:
            path.unlink(missing_ok=True)


def _tell_pip() -> None:
    """Notes the libraries in RECORD, where the package came from a wheel: `pip uninstall` removes what stands there."""
    packages = files.PACKAGE.parents[1]
    for record in packages.glob("torchcalc-*.dist-info/RECORD"):
        with record.open(newline="") as file:
            rows = [row for row in csv.reader(file) if not row[:1] or "/libtorchcalc" not in row[0]]
        for path in sorted(files.PACKAGE.glob("libtorchcalc*")):
            digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
            rows.append([path.relative_to(packages).as_posix(), f"sha256={digest}", str(path.stat().st_size)])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        files.publish(text.getvalue().encode(), record, stat.S_IMODE(record.stat().st_mode))


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
        directory = _writable(files.directories(), "set XDG_CACHE_HOME to a directory that is writable", files.danger)
    with cleaning_up(), tempfile.TemporaryDirectory(prefix="torchcalc-build-") as name:
        work = Path(name)
        generated = generate(work)
        kernels = directory / files.library_name(generated)
        nodes = directory / files.nodes_name(torch_version(torch_directory()))
        wanted = {
            library: work / library.name
            for library in ([kernels] if sanitize else [kernels, nodes])
            if again or not library.is_file() or files.damage(library)
        }
        if wanted:
            problem = _compile(wanted.get(kernels), wanted.get(nodes), generated, sanitize, work)
            if problem:
                warn(f"autograd's nodes were not built, and the functions run without kernels: {problem}")
                del wanted[nodes]
        for library, built in wanted.items():
            _install(built, library)
        os.utime(kernels)  # the newest is loaded
        if directory == files.PACKAGE:  # elsewhere other versions may have theirs
            _remove_stale(kernels)
            _tell_pip()
    return kernels


def build_what_is_missing() -> None:
    """For `make`: builds what is not up to date, and does without a compiler."""
    try:
        build(again=False)
    except BuildError as error:
        _say(f"the kernels were not built: {error}")
