"""Building the library: where it goes, what is said when it cannot be built, and that nobody sees half a file."""

import base64
import csv
import fnmatch
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from torchcalc.__main__ import main
from torchcalc.native import build, files
from torchcalc.native.hatch_build import platform_tag

ROOT = Path(files.__file__).parents[2]


GENERATED = {"loops.cpp": "// loops", "loops.h": "// their declarations"}
TORCH = build.torch_version(build.torch_directory())


# As the build hook gets at it.
BUILDER = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(files.PACKAGE)!r})
from hatch_build import _builder
build, files = _builder(Path({str(files.PACKAGE.parent)!r}))
"""


class Compiler:
    """A compiler that takes no time: writes the libraries that are asked for, and notes what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, bool, bool]] = []
        self.problem = ""

    def __call__(
        self, kernels: Path | None, nodes: Path | None, generated: dict[str, str], sanitize: bool, work: Path
    ) -> str:
        self.calls.append((kernels is not None, nodes is not None, sanitize))
        if kernels:
            kernels.write_bytes(b"x" * 1000)
        if nodes and not self.problem:
            nodes.write_bytes(b"y" * 100)
        return self.problem if nodes else ""


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is generated from the formulas."""
    texts = dict(GENERATED)
    monkeypatch.setattr(build, "generate", lambda work: texts)
    return texts


@pytest.fixture
def compiled(loops: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Compiler:
    fake = Compiler()
    monkeypatch.setattr(build, "_compile", fake)
    return fake


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory in the package's place."""
    directory = tmp_path / "site" / "torchcalc" / "native"
    directory.mkdir(parents=True)
    monkeypatch.setattr(files, "PACKAGE", directory)
    return directory


def built(nodes: bool = True, **generated: str) -> list[str]:
    """The names of the files that a build leaves."""
    names = [files.library_name(generated or GENERATED), *([files.nodes_name(TORCH)] if nodes else [])]
    return sorted(name + end for name in names for end in ("", ".sha256"))


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_builds_into_the_package_or_else_the_cache(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Compiler
) -> None:
    cache = tmp_path / "cache" / "torchcalc"
    name = files.library_name(GENERATED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.build() == package / name
    assert listing(package) == built()
    assert not cache.exists()
    # Root may write everywhere, so the answer is given here instead of asked from the file system.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != package and access(path, mode))
    assert build.build() == cache / name
    assert listing(cache) == built()
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(build.BuildError, match=r"cannot write to .*native; cannot write to .*cache.*XDG_CACHE_HOME"):
        build.build()
    monkeypatch.setattr(files, "PACKAGE", package / "file" / "below")
    (package / "file").write_bytes(b"")  # a directory that cannot be made
    with pytest.raises(build.BuildError, match="cannot write to"):
        build.build()


def test_nothing_is_built_where_it_would_not_be_loaded(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Compiler
) -> None:
    """A cache directory that others can write to."""
    cache = tmp_path / "cache" / "torchcalc"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != package and access(path, mode))
    with pytest.raises(build.BuildError, match=r"can be written by others than you \(mode 777\).*chmod go-w"):
        build.build()
    assert not listing(cache)


def test_output_that_cannot_be_written(tmp_path: Path, compiled: Compiler) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            build.BuildError, match=r"cannot write to .*file.*another directory with --output"
        ) as caught:
            build.build(output)
        assert "XDG_CACHE_HOME" not in str(caught.value)


def test_the_cache_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(sys, "platform", "linux")
    assert files.directories()[1] == Path("/home/someone/.cache/torchcalc")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert files.directories()[1] == Path("/home/someone/Library/Caches/torchcalc")
    assert files.library_name({}).endswith(".dylib")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home: no cache
    assert files.directories() == [files.PACKAGE]


@pytest.mark.parametrize("where", ["package", "elsewhere"])
def test_a_build_replaces_what_is_stale_in_the_package(
    where: str, package: Path, tmp_path: Path, compiled: Compiler
) -> None:
    """In a cache, which versions share, each keeps its own. Nodes for another torch are not stale."""
    target = package if where == "package" else tmp_path / "elsewhere"
    target.mkdir(exist_ok=True)
    name, nodes = files.library_name(GENERATED), files.nodes_name(TORCH)
    stale = [
        name.replace(files.source_hash(), "0" * 16),
        files.library_name({"loops.cpp": "// other loops"}),
        nodes.replace(files.node_hash(), "0" * 16),
    ]
    stale += [old + ".sha256" for old in stale]
    kept = ["libtorchcalc-0000000000000000-0000000000000000-linux_riscv64.so", files.nodes_name("2.99.1+cu130")]
    kept += [other + ".sha256" for other in kept]
    for file in [*stale, *kept]:
        (target / file).write_bytes(b"")
    build.build(target)
    assert listing(target) == sorted([*built(), *kept, *(stale if where == "elsewhere" else [])])
    assert os.access(target / name, os.X_OK)


def test_what_is_there_is_not_built_again(tmp_path: Path, loops: dict[str, str], compiled: Compiler) -> None:
    first = build.build(tmp_path, again=False)
    os.utime(first, (1, 1))
    assert build.build(tmp_path, again=False) == first
    assert compiled.calls == [(True, True, False)]
    assert first.stat().st_mtime > 1  # the newest is loaded: the one that was asked for last

    (tmp_path / files.nodes_name(TORCH)).rename(tmp_path / files.nodes_name("2.99.0"))  # another torch's environment
    build.build(tmp_path, again=False)
    assert compiled.calls[1:] == [(False, True, False)]

    first.write_bytes(b"cut short")
    build.build(tmp_path, again=False)
    assert compiled.calls[2:] == [(True, False, False)]

    loops["loops.cpp"] = "// a formula has changed"
    assert build.build(tmp_path, again=False) != first
    assert compiled.calls[3:] == [(True, False, False)]

    build.build(tmp_path)  # `python -m torchcalc build` was asked to
    assert compiled.calls[4:] == [(True, True, False)]


def test_the_kernels_do_without_the_nodes(tmp_path: Path, compiled: Compiler) -> None:
    compiled.problem = "c++ failed: no C++20"
    said: list[str] = []
    build.build(tmp_path, warn=said.append)
    assert said == ["autograd's nodes were not built, and the functions run without kernels: c++ failed: no C++20"]
    assert listing(tmp_path) == built(nodes=False)


def test_a_failed_build_leaves_nothing_behind(
    tmp_path: Path, loops: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(kernels: Path, *rest: object) -> str:
        kernels.write_bytes(b"half")
        raise build.BuildError("no")

    old = tmp_path / files.library_name(GENERATED)
    old.write_bytes(b"old")
    monkeypatch.setattr(build, "_compile", fails)
    with pytest.raises(build.BuildError):
        build.build(tmp_path)
    assert listing(tmp_path) == [old.name]
    assert old.read_bytes() == b"old"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signals here")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_build_that_is_told_to_stop_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """Neither files nor a compiler that still runs."""
    output, temporary, pids = (tmp_path / part for part in ("output", "temporary", "pids"))
    temporary.mkdir()
    slow = tmp_path / "c++"
    slow.write_text(f"#!/bin/sh\necho $$ >> {pids}\ntouch $TMPDIR/cc-half.s\nexec sleep 100\n")
    slow.chmod(0o755)
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this
{BUILDER}
build.generate = lambda work: {{}}
build.build(Path({str(output)!r}))
"""
    environment = {**os.environ, "CXX": str(slow), "TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not pids.exists() or not pids.read_text().endswith("\n"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=60) != 0
    assert not listing(output) and not listing(temporary)
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_concurrent_builds_never_show_half_a_file(
    tmp_path: Path, loops: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = b"x" * 100_000
    library = tmp_path / files.library_name(GENERATED)
    seen: list[str] = []
    stop = threading.Event()

    def slowly(kernels: Path, nodes: Path, *rest: object) -> str:
        for target in (kernels, nodes):
            with target.open("wb") as file:
                for _ in range(0, len(whole), 1000):
                    file.write(whole[:1000])
                    file.flush()
        return ""

    def watch() -> None:
        while not stop.is_set():
            if library.exists():
                seen.append(files.damage(library))

    monkeypatch.setattr(build, "_compile", slowly)
    watcher = threading.Thread(target=watch)
    watcher.start()
    builders = [threading.Thread(target=build.build, args=(tmp_path,)) for _ in range(8)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    while not seen:
        pass
    stop.set()
    watcher.join()
    assert set(seen) == {""}
    assert listing(tmp_path) == built()


def test_sanitizers_go_elsewhere(tmp_path: Path, compiled: Compiler) -> None:
    with pytest.raises(ValueError, match="needs output="):
        build.build(sanitize=True)
    assert build.build(tmp_path, sanitize=True).parent == tmp_path
    assert compiled.calls == [(True, False, True)]  # the nodes are no part of it


# --- what is compiled -------------------------------------------------------------------------------------------------

# Writes what it is told to, and its own command line into a file beside it.
FAKE = """#!/bin/sh
all="$*"
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then echo "$all" > "$2"; fi
  shift
done
echo "$all" >> {log}
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command lines that a compiler was called with, one a line."""
    log = tmp_path / "commands"
    fake = tmp_path / "c++"
    fake.write_text(FAKE.format(log=log))
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setattr(build, "_store", lambda: None)
    return log


def test_every_source_is_compiled_and_linked(tmp_path: Path, loops: dict[str, str], commands: Path) -> None:
    library = build.build(tmp_path / "out")
    lines = commands.read_text().splitlines()
    compiles = {line.partition(" -c ")[2].split()[0]: line for line in lines if " -c " in line}
    kernels = {str(path) for path in files.SOURCES.glob("*.cpp")} | {"generated/loops.cpp"}  # a header is not compiled
    nodes = {str(path) for path in files.NODES.glob("*.cpp")}
    assert compiles.keys() == kernels | nodes
    for name, line in compiles.items():
        assert ("-std=c++20" in line) == (name in nodes) and ("api/include" in line) == (name in nodes)
        assert f"-I {files.SOURCES}" in line
        told = f'-DTORCHCALC_SOURCE_HASH="{files.source_hash()}"' in line
        assert told == name.endswith("library.cpp")
    linked = library.read_text()
    assert "generated-loops.o" in linked and "csrc-adam.o" in linked and "node" not in linked
    assert "node-node.o" in library.with_name(files.nodes_name(TORCH)).read_text()


def test_only_what_changed_is_compiled_again(
    tmp_path: Path, loops: dict[str, str], commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout. All that could change an object counts; what was not used for long is thrown away."""
    store, sources = tmp_path / "objects", tmp_path / "csrc"
    monkeypatch.setattr(build, "_store", lambda: store)
    shutil.copytree(files.SOURCES, sources)
    monkeypatch.setattr(files, "SOURCES", sources)
    monkeypatch.setattr(files, "NODES", sources / "node")

    def compiled() -> set[str]:
        commands.unlink(missing_ok=True)
        build.build(tmp_path / "out")
        lines = commands.read_text().splitlines()
        return {Path(line.partition(" -c ")[2].split()[0]).name for line in lines if " -c " in line}

    all_kernels = {path.name for path in sources.glob("*.cpp")} | {"loops.cpp"}
    everything = all_kernels | {path.name for path in files.NODES.glob("*.cpp")}
    assert compiled() == everything
    assert compiled() == set()
    loops["loops.cpp"] = "// a formula has changed"
    assert compiled() == {"loops.cpp"}
    loops["loops.cpp"] = GENERATED["loops.cpp"]
    assert compiled() == set()
    with (sources / "norm.cpp").open("a") as file:
        file.write("//\n")
    assert compiled() == {"norm.cpp", "library.cpp"}  # which holds the hash of all
    loops["loops.h"] = "// another declaration"
    assert compiled() == everything
    (sources / "tensor.h").write_text("//")
    assert compiled() == everything
    monkeypatch.setattr(files, "NODE_FLAGS", [*files.NODE_FLAGS, "-g"])
    assert compiled() == everything - all_kernels
    monkeypatch.setattr(build, "torch_version", lambda directory: "2.99.0")
    assert compiled() == everything
    compiler = tmp_path / "c++"
    compiler.write_text(compiler.read_text() + "# version 13\n")
    assert compiled() == everything
    for path in store.iterdir():
        os.utime(path, (1, 1))
    old = set(store.iterdir())
    monkeypatch.setattr(files, "NODE_FLAGS", [*files.NODE_FLAGS, "-g1"])
    assert compiled() == everything - all_kernels
    assert len(old & set(store.iterdir())) == len(all_kernels)  # those that this build has used


def test_an_installed_package_keeps_no_objects(package: Path) -> None:
    assert build._store() is None
    (package.parents[1] / "pyproject.toml").write_text("")
    assert build._store() == package.parents[1] / "build" / "objects"


def test_every_name_and_text_counts() -> None:
    names = [
        files.library_name(generated)
        for generated in ({}, {"a.cpp": ""}, {"b.cpp": ""}, {"a.cpp": "x"}, {"a.cpp": "x", "b.cpp": ""})
    ]
    assert len(set(names)) == len(names)
    assert files.library_name({"a": "1", "b": "2"}) == files.library_name({"b": "2", "a": "1"})
    assert all(fnmatch.fnmatch(name, files.pattern()) for name in names)


def test_what_the_nodes_include_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SOURCES", tmp_path)
    monkeypatch.setattr(files, "NODES", tmp_path / "node")
    texts = {
        "node/a.cpp": '#include <vector>\n#include "a.h"\n# include "shared.h"\n',
        "node/a.h": "",
        "shared.h": '  #include "deep.h"',
        "deep.h": '#include "shared.h"',
    }
    (tmp_path / "node").mkdir()
    for name, text in {**texts, "other.h": "", "kernel.cpp": ""}.items():
        (tmp_path / name).write_text(text)
    original = files.node_hash()
    assert files.nodes_name("2.13.0+cpu").startswith(f"libtorchcalc_nodes-{original}-torch2.13.0_cpu-")
    for name in ("other.h", "kernel.cpp"):
        (tmp_path / name).write_text("//")
        assert files.node_hash() == original
    for name, text in texts.items():
        (tmp_path / name).write_text(text + "\n//")
        assert files.node_hash() != original
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(files, "NODE_FLAGS", [*files.NODE_FLAGS, "-g"])
    assert files.node_hash() != original


def formula(package: Path, text: str) -> None:
    """A package of which only the formulas are there."""
    for directory in (package.parent, package.parent / "formula"):
        directory.mkdir(exist_ok=True)
        (directory / "__init__.py").write_text("")
    (package.parent / "formula" / "generate.py").write_text(text)


def test_generating(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the package's own formulas, with torch at hand, and without kernels; what is printed is not in the way."""
    monkeypatch.setenv("TORCHCALC_NATIVE", "1")
    text = """
        import os, torch
        print("hello")
        def sources():
            return {"σ.cpp": f"// {torch.ones(2).sum().item()} {os.environ['TORCHCALC_NATIVE']}"}
    """
    formula(package, textwrap.dedent(text))
    assert build.generate(tmp_path) == {"σ.cpp": "// 2.0 0"}


def test_generating_fails(package: Path, tmp_path: Path) -> None:
    formula(package, "def sources():\n    raise ValueError('mish: no slope')\n")
    with pytest.raises(build.BuildError, match=r"no loops could be generated.*ValueError: mish: no slope"):
        build.build(tmp_path / "out")
    assert not listing(tmp_path / "out")


def test_pip_is_told_of_the_libraries(package: Path, compiled: Compiler) -> None:
    """What stands in RECORD is uninstalled with the package."""
    record = package.parents[1] / "torchcalc-1.0.dist-info" / "RECORD"
    record.parent.mkdir()
    others = 'torchcalc/__init__.py,sha256=x,1\n"torchcalc/a,b.py",sha256=y,2\n'
    stale = "torchcalc/native/libtorchcalc-0-linux.so,sha256=z,3\n"
    record.write_text(others + stale)
    for _ in range(2):
        build.build()
        with record.open(newline="") as file:
            rows = {row[0]: row[1:] for row in csv.reader(file)}
        assert list(rows)[:2] == ["torchcalc/__init__.py", "torchcalc/a,b.py"]
        assert [name.rpartition("/")[2] for name in list(rows)[2:]] == built()
    for name in built():
        content = (package / name).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        assert rows[f"torchcalc/native/{name}"] == [f"sha256={digest}", str(len(content))]
    assert listing(record.parent) == ["RECORD"]


# --- what keeps it from being built -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("loops")
def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found.*python -m torchcalc build"):
        build.build(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert build.compiler() == ["no-such-compiler", "-O1"]
    with pytest.raises(build.BuildError, match=r"no-such-compiler could not be run.*\$CXX"):
        build.build(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("loops")
def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\necho 'note: something' >&2\necho 'x.cpp:1: error: what is constexpr?' >&2\nexit 3\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.BuildError, match=r"exit status 3[\s\S]*what is constexpr") as caught:
        build.build(tmp_path / "out")
    assert "something" not in str(caught.value)


def test_without_torch_or_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = tmp_path / "torch"
    torch.mkdir()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path), "platlib": str(tmp_path)})
    monkeypatch.setattr(build.site, "getsitepackages", list)
    monkeypatch.setattr(build.site, "getusersitepackages", lambda: str(tmp_path / "none"))
    with pytest.raises(build.BuildError, match=r"torch is not installed.*Install it"):
        build.torch_directory()
    (torch / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    with pytest.raises(build.BuildError, match=r"torch 2\.9 has no stable ABI"):
        build.torch_directory()
    (torch / "version.py").write_text("from typing import Optional\n__version__ = '2.13.0+cpu'\n")
    with pytest.raises(build.BuildError, match="without its C\\+\\+ headers"):
        build.torch_directory()
    (torch / "include/torch/csrc/stable").mkdir(parents=True)
    (torch / "include/torch/csrc/stable/library.h").write_text("")
    assert build.torch_directory() == torch
    assert build.torch_version(torch) == "2.13.0+cpu"


def test_windows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build.BuildError, match="Windows"):
        build.build()


def test_the_hook_needs_neither_torch_nor_torchcalc() -> None:
    code = f"""{BUILDER}
assert not {{"torch", "torchcalc"}} & set(sys.modules)
print(files.pattern())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == files.pattern()


# --- the command line, the hook, and a build from nothing -------------------------------------------------------------


def torchcalc(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchcalc", *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip


def test_the_report() -> None:
    result = torchcalc(TORCHCALC_NATIVE_ISA="baseline")
    assert result.returncode == 0, result.stderr
    rows = dict(
        line.split(maxsplit=1)
        for line in result.stdout.replace("instruction set", "instructions")
        .replace("autograd's nodes", "nodes")
        .replace("on GPUs", "gpus")
        .splitlines()
    )
    assert list(rows) == [
        "torchcalc",
        "torch",
        "python",
        "kernels",
        "instructions",
        "nodes",
        "gpus",
        "threads",
        "devices",
    ]
    assert rows["nodes"] == "loaded"
    assert rows["kernels"].startswith("loaded from /")
    assert rows["instructions"] in ("baseline", "neon")
    assert rows["devices"].startswith("cpu")
    off = torchcalc(TORCHCALC_NATIVE="0")
    assert off.returncode == 0
    assert "kernels          not loaded: switched off by TORCHCALC_NATIVE=0" in off.stdout
    assert "pure PyTorch" in off.stdout


@pytest.mark.usefixtures("loops")
def test_the_command_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["build", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("torchcalc: the kernels were not built: no-such-compiler could not be run")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(["build", "--output", str(tmp_path / "file")])
    assert "--output" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["build", "--sanitize"])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with our hook, and nothing else of ours that would have to be built."""
    source = tmp_path / "project" / "torchcalc"
    shutil.copytree(files.PACKAGE, source / "native", ignore=shutil.ignore_patterns("__pycache__", "libtorchcalc-*"))
    formula(source / "native", f"def sources():\n    return {GENERATED}\n")
    (source.parent / ".gitignore").write_text("*.so\n*.so.sha256\n*.dylib\n*.dylib.sha256\n")
    (source.parent / "pyproject.toml").write_text(
        """
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"
        [project]
        name = "torchcalc"
        version = "1.0"
        requires-python = ">=3.11"
        [tool.hatch.build.targets.wheel]
        packages = ["torchcalc"]
        [tool.hatch.build.targets.wheel.hooks.custom]
        path = "torchcalc/native/hatch_build.py"
        """
    )
    return source.parent


def wheel(project: Path, **environment: str) -> tuple[str, list[str], str]:
    """The wheel's name, its files, and what was printed."""
    result = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"],
        env={**os.environ, **environment}, capture_output=True, text=True, cwd=project, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (path,) = (project / "out").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path.name, archive.namelist(), result.stdout + result.stderr


def test_a_wheel_without_a_compiler_is_pure(project: Path) -> None:
    name, names, output = wheel(project, CXX="no-such-compiler")
    assert name == "torchcalc-1.0-py3-none-any.whl"
    assert "torchcalc/native/csrc/adam.cpp" in names  # to be compiled later
    assert not any("libtorchcalc" in file for file in names)
    assert "without its CPU kernels" in output and "no-such-compiler" in output


@pytest.mark.parametrize(
    ("platform", "symbols", "tag"),
    [
        ("linux-x86_64", b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.17\0", "manylinux_2_34_x86_64"),
        ("linux-x86_64", b"of musl", "linux_x86_64"),
        ("macosx-14.0-arm64", b"", "macosx_14_0_arm64"),
    ],
)
def test_a_wheel_says_which_system_its_libraries_need(platform, symbols, tag, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(symbols)
    assert platform_tag(platform, [tmp_path / "lib.so", tmp_path / "missing.so"]) == tag


def test_a_wheel_holds_the_libraries(project: Path, commands: Path) -> None:
    (project / "torchcalc/native" / files.nodes_name("2.99.0")).write_bytes(b"")  # another environment's
    name, names, _ = wheel(project)
    assert name.startswith("torchcalc-1.0-py3-none-") and not name.endswith("-any.whl")
    assert {f"torchcalc/native/{file}" for file in built()} == {file for file in names if "libtorchcalc" in file}
    assert "torchcalc/native/csrc/adam.cpp" in names


def test_torch_is_found_under_build_isolation(project: Path, commands: Path, tmp_path: Path) -> None:
    """As pip builds: only what the build requires can be imported, and torch lies in this Python's site-packages."""
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    for name in ("hatchling", "packaging", "pathspec", "pluggy", "trove_classifiers"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        (isolated / name).symlink_to(Path(spec.origin).parent)
    hide = "import site, sys\nsys.path[:] = [path for path in sys.path if path not in site.getsitepackages()]\n"
    (isolated / "sitecustomize.py").write_text(hide)
    environment = {**os.environ, "PYTHONPATH": str(isolated), "PYTHONNOUSERSITE": "1"}
    hidden = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "No module named 'torch'" in hidden.stderr
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=project, timeout=300)
    assert result.returncode == 0, result.stderr
    (path,) = (project / "out").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert {f"torchcalc/native/{file}" for file in built()} <= set(names)
    assert "loops.cpp" in commands.read_text()  # a Python that sees torch has generated it


@pytest.mark.slow
def test_a_fresh_build_loads(tmp_path: Path) -> None:
    result = torchcalc("build", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (library,) = tmp_path.glob(files.pattern())
    assert str(library) in result.stdout
    report = torchcalc(TORCHCALC_NATIVE_LIBRARY=str(library)).stdout
    assert f"loaded from {library}" in report


def test_every_kernel_is_in_one_library_without_python() -> None:
    from torchcalc import native

    library: Any = native.library()
    names = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True)
    if names.returncode != 0:
        pytest.skip("no nm here")
    assert "torch_parallel_for" in names.stdout
    assert not [line for line in names.stdout.splitlines() if " Py" in line or " _Py" in line]
