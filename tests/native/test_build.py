"""Building the library: where it goes, what is said when it cannot be built, and that nobody sees half a file."""

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from torchcalc.native import build

ROOT = Path(build.__file__).parents[2]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A compiler that takes no time: writes the file, and notes whether sanitizers were asked for."""
    calls: list[bool] = []

    def write(target: Path, sanitize: bool) -> None:
        target.write_bytes(b"x" * 1000)
        calls.append(sanitize)

    monkeypatch.setattr(build, "_compile", write)
    return calls


def test_builds_into_the_package_or_else_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[bool]
) -> None:
    package, cache = tmp_path / "package", tmp_path / "cache" / "torchcalc"
    package.mkdir()
    monkeypatch.setattr(build, "PACKAGE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.build() == package / build.library_name()
    assert not cache.exists()
    # Root may write everywhere, so the answer is given here instead of asked from the file system.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != package and access(path, mode))
    assert build.build() == cache / build.library_name()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(build.BuildError, match=r"cannot write to .*package nor to .*cache.*XDG_CACHE_HOME"):
        build.build()
    monkeypatch.setattr(build, "PACKAGE", package / "file" / "below")
    (package / "file").write_bytes(b"")  # a directory that cannot be made
    with pytest.raises(build.BuildError, match="cannot write to"):
        build.build()


def test_the_cache_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(sys, "platform", "linux")
    assert build.directories()[1] == Path("/home/someone/.cache/torchcalc")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert build.directories()[1] == Path("/home/someone/Library/Caches/torchcalc")
    assert build.library_name().endswith(".dylib")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home: no cache
    assert build.directories() == [build.PACKAGE]


@pytest.mark.parametrize("package", [True, False], ids=["package", "elsewhere"])
def test_a_build_replaces_what_is_stale_in_the_package(
    package: bool, tmp_path: Path, compiled: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache, which versions share, each keeps its own."""
    if package:
        monkeypatch.setattr(build, "PACKAGE", tmp_path)
    name = build.library_name()
    stale = tmp_path / name.replace(build.source_hash(), "0" * 16)
    foreign = tmp_path / "libtorchcalc-0000000000000000-linux_riscv64.so"
    stale.write_bytes(b"")
    foreign.write_bytes(b"")
    build.build(tmp_path)
    kept = [name, foreign.name] if package else [name, foreign.name, stale.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert os.access(tmp_path / name, os.X_OK)


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(target: Path, sanitize: bool) -> None:
        raise build.BuildError("no")

    old = tmp_path / build.library_name()
    old.write_bytes(b"old")
    monkeypatch.setattr(build, "_compile", fails)
    with pytest.raises(build.BuildError):
        build.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert old.read_bytes() == b"old"


def test_concurrent_builds_never_show_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = b"x" * 100_000
    library = tmp_path / build.library_name()
    seen: list[int] = []
    stop = threading.Event()

    def slowly(target: Path, sanitize: bool) -> None:
        with target.open("wb") as file:
            for i in range(0, len(whole), 1000):
                file.write(whole[i : i + 1000])
                file.flush()

    def watch() -> None:
        while not stop.is_set():
            if library.exists():
                seen.append(library.stat().st_size)

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
    assert set(seen) == {len(whole)}
    assert [path.name for path in tmp_path.iterdir()] == [library.name]


def test_sanitizers_go_elsewhere(tmp_path: Path, compiled: list[bool]) -> None:
    with pytest.raises(ValueError, match="needs output="):
        build.build(sanitize=True)
    assert build.build(tmp_path, sanitize=True).parent == tmp_path
    assert compiled == [True]


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
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match=r"torch is not installed.*--no-build-isolation"):
        build.torch_directory()
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: Spec)
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    with pytest.raises(build.BuildError, match=r"torch 2\.9 has no stable ABI"):
        build.torch_directory()
    (tmp_path / "version.py").write_text("__version__ = '2.13.0'\n")
    with pytest.raises(build.BuildError, match="without its C\\+\\+ headers"):
        build.torch_directory()
    (tmp_path / "include/torch/csrc/stable").mkdir(parents=True)
    (tmp_path / "include/torch/csrc/stable/library.h").write_text("")
    assert build.torch_directory() == tmp_path


def test_windows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build.BuildError, match="Windows"):
        build.build()


def test_build_is_importable_without_torchcalc() -> None:
    # hatchling loads it by path, in an environment that may have neither torch nor torchcalc
    code = (
        f"import sys, runpy; names = runpy.run_path({build.__file__!r}); "
        "assert not {'torch', 'torchcalc'} & set(sys.modules); print(names['library_name']())"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == build.library_name()


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
        line.split(maxsplit=1) for line in result.stdout.replace("instruction set", "instructions").splitlines()
    )
    assert list(rows) == ["torchcalc", "torch", "python", "kernels", "instructions", "threads", "devices"]
    assert rows["kernels"].startswith("loaded from /")
    assert rows["instructions"] in ("baseline", "neon")
    assert rows["devices"].startswith("cpu")
    off = torchcalc(TORCHCALC_NATIVE="0")
    assert off.returncode == 0
    assert "kernels          not loaded: switched off by TORCHCALC_NATIVE=0" in off.stdout
    assert "pure PyTorch" in off.stdout


def test_the_command_says_why_not(tmp_path: Path) -> None:
    result = torchcalc("build", "--output", str(tmp_path), CXX="no-such-compiler")
    assert result.returncode == 1
    assert result.stderr.startswith("torchcalc: the kernels were not built: no-such-compiler could not be run")
    assert torchcalc("build", "--sanitize").returncode == 2


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with our hook, and nothing else of ours that would have to be built."""
    source = tmp_path / "project" / "torchcalc"
    shutil.copytree(build.PACKAGE, source / "native", ignore=shutil.ignore_patterns("__pycache__", "libtorchcalc-*"))
    (source / "__init__.py").write_text("")
    (source.parent / ".gitignore").write_text("*.so\n*.dylib\n")
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
    name, files, output = wheel(project, CXX="no-such-compiler")
    assert name == "torchcalc-1.0-py3-none-any.whl"
    assert "torchcalc/native/csrc/adam.cpp" in files  # to be compiled later
    assert not any(file.endswith(".so") for file in files)
    assert "without its CPU kernels" in output and "no-such-compiler" in output


@pytest.mark.slow
def test_a_wheel_holds_the_library(project: Path) -> None:
    name, files, _ = wheel(project)
    assert name.startswith("torchcalc-1.0-py3-none-") and not name.endswith("-any.whl")
    assert f"torchcalc/native/{build.library_name()}" in files
    assert "torchcalc/native/csrc/adam.cpp" in files


@pytest.mark.slow
def test_a_fresh_build_loads(tmp_path: Path) -> None:
    result = torchcalc("build", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    library = tmp_path / build.library_name()
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
