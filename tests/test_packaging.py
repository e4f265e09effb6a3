"""What a user gets by installing torchcalc: a light import, ranges that were tested, a wheel that works."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import torchcalc
from torchcalc.__main__ import main as command

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = dict(line.lower().split("==") for line in CONSTRAINTS)


def python(code: str, *options: str, cwd: Path = ROOT, executable: str = sys.executable) -> str:
    command = [executable, *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    """Nothing but torchcalc itself and the standard library comes on top of ``import torch``.

    What adds at most 50 ms to the import is tested by what is imported, not by a clock that depends on the machine.
    """
    new = python(
        "import sys, torch; before = set(sys.modules); import torchcalc; print(*sorted(set(sys.modules) - before))"
    ).split()
    assert "torchcalc.optim" in new
    foreign = {name for name in new if name.partition(".")[0] not in {"torchcalc", *sys.stdlib_module_names}}
    assert not foreign


def test_import_is_silent_and_touches_no_state():
    """No output, no warning, no thread, no change of torch's settings; the kernels are loaded on first use."""
    code = """
import threading, torch
before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), threading.active_count()
import torchcalc
after = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype(), threading.active_count()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
from torch._C import _dispatch_get_all_op_names
assert not [name for name in _dispatch_get_all_op_names() if name.startswith("torchcalc::")]
"""
    assert python(code, "-W", "error") == ""


def test_namespaces():
    assert set(torchcalc.__all__) >= {"__version__", "autograd", "functional", "nn", "optim"}
    for name in torchcalc.__all__:
        assert hasattr(torchcalc, name)


def test_namespaces_that_a_training_script_seldom_needs_come_when_asked_for():
    """Of them, Lightning comes with the instruments alone."""
    new = python("""
import sys, torchcalc
assert {"testing", "instruments"} <= set(dir(torchcalc))
assert not {"torchcalc.testing", "torchcalc.instruments"} & set(sys.modules)
assert torchcalc.testing.check_function.__module__ == "torchcalc.testing.functions"
assert "lightning" not in sys.modules
assert torchcalc.instruments.Instruments.__module__ == "torchcalc.instruments.instruments"
from torchcalc import *
assert testing is torchcalc.testing
""")
    assert new == ""
    with pytest.raises(AttributeError, match="module 'torchcalc' has no attribute 'tesing'"):
        torchcalc.tesing  # noqa: B018


def test_version_from_the_command_line(capsys):
    with pytest.raises(SystemExit) as end:
        command(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out == f"torchcalc {torchcalc.__version__}\n"


def test_build_says_which_output_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        command(["build", "--output", str(tmp_path / "file" / "below")])
    assert end.value.code == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.endswith("file/below: Not a directory; give a directory that can be written to")


def test_package_is_typed():
    assert (Path(torchcalc.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)])
def test_requirement_is_pinned_and_admits_its_pin(text):
    requirement = Requirement(text)
    assert requirement.specifier.contains(PINS[requirement.name.lower()])


def test_torch_range_admits_what_was_tested_and_no_more():
    (torch_range,) = (Requirement(text).specifier for text in PROJECT["dependencies"])
    other = re.search(r"^OTHER_TORCH := (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    assert torch_range.contains(PINS["torch"])
    assert torch_range.contains(other)
    assert torch_range.contains(torch.__version__.partition("+")[0])
    assert not torch_range.contains("2.9.1")
    assert not torch_range.contains("2.15.0")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
def test_wheel_holds_the_package_the_plugin_and_nothing_else(built):
    _, wheel = built
    info = f"torchcalc-{torchcalc.__version__}.dist-info"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"torchcalc", "pytest_torchcalc.py", info}
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "torchcalc").rglob("*.py")}
    source.remove("torchcalc/testing/plugin/pytest_torchcalc.py")  # which stands beside the package there
    assert source | {"torchcalc/py.typed", f"{info}/licenses/LICENSE"} <= set(names)
    libraries = {re.sub("-.*", "", name) for name in names if "libtorchcalc" in name and not name.endswith(".sha256")}
    assert libraries == {"torchcalc/native/libtorchcalc", "torchcalc/native/libtorchcalc_nodes"}
    metadata = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    assert "Requires-Dist: torch<2.15,>=2.10\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert "License-Expression: BSD-3-Clause\n" in metadata


@pytest.mark.slow
def test_sdist_can_be_tested(built):
    sdist, _ = built
    top = f"torchcalc-{torchcalc.__version__}"
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    for needed in (
        "Makefile",
        "constraints.txt",
        "configs/digits.yaml",
        "recipes/digits.py",
        "tests/conftest.py",
        ".docs/mkdocs.yml",
    ):
        assert f"{top}/{needed}" in names
    assert not [name for name in names if re.search(r"/(runs|\.venv[^/]*|__pycache__)/|\.so$", name)]


@pytest.fixture
def installed(built, tmp_path, monkeypatch):
    """The Python of an environment that has the wheel, torch and numpy to read, but not this checkout; its packages."""
    _, wheel = built
    monkeypatch.delenv("PYTHONPATH", raising=False)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    executable = str(tmp_path / "venv" / "bin" / "python")
    site = python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=executable).strip()
    # Torch is borrowed, not downloaded again. The .pth files there, the editable install's among them, stay unread.
    Path(site, "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    install = [executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    return executable, site


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(installed, tmp_path):
    executable, site = installed
    code = f"""
import importlib.metadata, torch, torchcalc
assert torchcalc.__file__.startswith({site!r}), torchcalc.__file__
assert torchcalc.__version__ == importlib.metadata.version("torchcalc") == {torchcalc.__version__!r}
net = torchcalc.nn.Linear(4, 3)
optimizer = torchcalc.optim.AdamW(net.parameters(), lr=0.1)
x, y = torch.randn(16, 4), torch.randint(3, (16,))
losses = []
for _ in range(30):
    optimizer.zero_grad()
    losses.append(torchcalc.functional.cross_entropy(net(x), y))
    losses[-1].backward()
    optimizer.step()
assert losses[-1] < losses[0]
native = torchcalc.native
assert native.library() is not None and str(native.library()).startswith({site!r}), native.why_not()
assert native.nodes(), native.why_no_nodes()
"""
    python(code, "-W", "error", cwd=tmp_path, executable=executable)
    # And every example in its docstrings.
    doctests = [executable, "-m", "pytest", "-q", "-c", "/dev/null", "--doctest-modules", "--pyargs", "torchcalc"]
    done = subprocess.run(doctests, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d\d+ passed", done.stdout, flags=re.MULTILINE), done.stdout


@pytest.mark.slow
def test_uninstalling_leaves_nothing(installed, tmp_path, monkeypatch):
    """Not the libraries that were built after the installation either: an empty torchcalc could be imported."""
    executable, site = installed
    native = Path(site, "torchcalc", "native")
    first = {path.name for path in native.glob("libtorchcalc*")}
    with (native / "csrc" / "isa.h").open("a") as file:
        file.write("\n")  # other sources, other names
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && echo > "$2"; shift; done; true\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    done = subprocess.run([executable, "-m", "torchcalc", "build"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {path.name for path in native.glob("libtorchcalc-*")} & first
    uninstall = [executable, "-m", "pip", "uninstall", "--yes", "--quiet", "torchcalc"]
    subprocess.run(uninstall, check=True, cwd=tmp_path, timeout=120)
    assert not Path(site, "torchcalc").exists()
    with pytest.raises(AssertionError, match="No module named 'torchcalc'"):
        python("import torchcalc", cwd=tmp_path, executable=executable)
