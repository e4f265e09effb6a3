"""Finding and loading the library: what keeps it from loading is said, with the remedy, and nothing raises."""

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchcalc import native
from torchcalc.formula import dispatch
from torchcalc.formula.pointwise import FORMULAS, Formula
from torchcalc.native import files, load, pointwise

REMEDY = "python -m torchcalc build"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests look for libraries of their own, whatever the session was started with."""
    monkeypatch.delenv("TORCHCALC_NATIVE", raising=False)
    monkeypatch.delenv("TORCHCALC_NATIVE_LIBRARY", raising=False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory where libraries are looked for."""
    monkeypatch.setattr(files, "directories", lambda: [tmp_path])
    return tmp_path


def kernels() -> tuple[Path | None, str]:
    """What becomes of the kernels here and now."""
    loaded = load._load()
    return loaded.kernels, loaded.why_not


def put(content: bytes, path: Path) -> Path:
    """A library as the build leaves it."""
    path.write_bytes(content)
    files.hash_file(path).write_text(hashlib.sha256(content).hexdigest() + "\n")
    return path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is not loaded: a process takes the same operators once."""
    monkeypatch.setattr(load, "_load_file", lambda path, problem: (path, problem))


def name(generated: str = "") -> str:
    return files.library_name({"generated.cpp": generated})


def run(code: str, **environment: str) -> str:
    """The output of a fresh Python."""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_loaded() -> None:
    assert native.available()
    assert native.why_not() == ""
    path = native.library()
    assert path is not None and path.is_file()


@pytest.mark.parametrize("value", ["0", "false", "False", "off", "no"])
def test_the_environment_switches_it_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCALC_NATIVE", value)
    loaded = load._load()
    assert loaded.kernels is None and loaded.nodes is None
    assert loaded.why_not.startswith(f"switched off by TORCHCALC_NATIVE={value} in the environment")


@pytest.mark.parametrize("value", ["", "1", "true", "ON", "yes"])
def test_the_environment_leaves_it_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCALC_NATIVE", value)
    assert kernels() == (native.library(), "")


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("TORCHCALC_NATIVE", "fasle", "0, false, off, no"),
        ("TORCHCALC_NATIVE", "2", "1, true, on, yes"),
        ("TORCHCALC_NATIVE_ISA", "avx-2", "avx512, avx2, baseline, neon"),
        ("TORCHCALC_NATIVE_ISA", "AVX2", "avx512, avx2, baseline, neon"),
    ],
)
def test_a_misspelt_wish_is_refused(variable: str, value: str, accepted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ignored: kernels other than those that were asked for would be measured, or trusted."""
    monkeypatch.setenv(variable, value)
    loaded = load._load()
    assert loaded.kernels is None and loaded.nodes is None and not loaded.intended
    assert f"{variable}={value} is n" in loaded.why_not and accepted in loaded.why_not and "unset it" in loaded.why_not


def test_one_warning_where_a_kernel_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_warned", False)
    tensors = [torch.ones(2), torch.nn.Parameter(torch.ones(2))]
    native.warn_once(tensors)  # the kernels are there
    monkeypatch.setattr(load, "_loaded", load._load())
    for x in (torch.ones(2, dtype=torch.int64), torch.ones(2, device="meta"), torch.eye(2).to_sparse(), None):
        native.warn_once([*tensors, x])  # which no kernel would have taken
    with pytest.warns(RuntimeWarning, match=rf"without its CPU kernels.*not built.*{REMEDY}") as caught:
        native.warn_once(tensors)
    assert [w.filename for w in caught] == [__file__]
    native.warn_once(tensors)


def test_no_warning_where_they_were_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHCALC_NATIVE", "off")
    monkeypatch.setattr(load, "_warned", False)
    monkeypatch.setattr(load, "_loaded", load._load())
    native.warn_once([torch.ones(2)])


@pytest.mark.parametrize("missing", ["kernels", "nodes"])
def test_one_warning_at_the_first_function_without_kernels(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"kernels": None, "why_not": "not built. Run this."} if missing == "kernels" else {}
    loaded = load._load_once()._replace(nodes=None, why_no_nodes="not built. Run this.", **changes)
    monkeypatch.setattr(load, "_loaded", loaded)
    monkeypatch.setattr(pointwise, "index", lambda formula: -1)
    silu = dispatch.elementwise(FORMULAS["SiLU"], torch.nn.functional.silu)
    mse = dispatch.reduced(FORMULAS["MSELoss"], lambda x, t, *_: torch.nn.functional.mse_loss(x, t))
    mine = Formula("Mine", lambda x: x, [lambda: 1], ("x",), ())
    x = torch.ones(3)
    for call in (lambda: silu(x), lambda: mse(x, x, None, "sum", False)):
        monkeypatch.setattr(load, "_warned", False)
        silu(x.cfloat())
        torch.func.grad(lambda x: silu(x).sum())(x)
        dispatch.elementwise(mine, torch.abs)(x)  # nobody builds a kernel of this one
        with pytest.warns(RuntimeWarning, match=f"without .*{missing}.*not built. Run this") as caught:
            call()
        assert [w.filename for w in caught] == [__file__]
        call()


def test_importing_loads_nothing() -> None:
    code = "import torch, torchcalc, torchcalc.native.optim; print(hasattr(torch.ops.torchcalc, 'adam_bound_'))"
    assert run(code) == "False"


def test_not_built(place: Path) -> None:
    path, why = kernels()
    assert path is None
    assert "not built" in why and str(place) in why and REMEDY in why


def test_built_from_other_sources(place: Path) -> None:
    stale = place / name().replace(files.source_hash(), "0" * 16)
    stale.write_bytes(b"")
    path, why = kernels()
    assert path is None
    assert str(stale) in why and "other sources" in why and REMEDY in why


def test_every_source_and_option_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in [path for path in files.SOURCES.iterdir() if path.is_file()]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    original = files.source_hash()
    monkeypatch.setattr(files, "SOURCES", tmp_path)
    assert files.source_hash() == original
    for path in tmp_path.iterdir():
        kept = path.read_bytes()
        path.write_bytes(kept + b"\n")
        assert files.source_hash() != original
        path.write_bytes(kept)
    monkeypatch.setattr(files, "FLAGS", [*files.FLAGS, "-g"])
    assert files.source_hash() != original


def test_a_broken_file(place: Path) -> None:
    put(b"not a library", place / name())
    path, why = kernels()
    assert path is None
    assert "does not load" in why and torch.__version__ in why and REMEDY in why


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3, 0.6, 0.99])
def test_a_file_that_was_cut_short(share: float, place: Path) -> None:
    """The loader would map it, and the process end at the first page that is not there."""
    whole = native.library()
    assert whole is not None
    data = whole.read_bytes()
    put(data, place / name()).write_bytes(data[: int(share * len(data))])
    path, why = kernels()
    assert path is None
    assert "damaged" in why and REMEDY in why


def test_a_file_without_its_hash(place: Path) -> None:
    files.hash_file(put(b"library", place / name())).unlink()
    path, why = kernels()
    assert path is None
    assert ".sha256 cannot be read" in why and REMEDY in why


def test_the_newest_that_is_whole(place: Path) -> None:
    """Of libraries with the same C++ and other generated loops; a damaged one keeps no other from being loaded."""
    first, second, damaged = (put(b"library", place / name(text)) for text in ("a", "b", "c"))
    damaged.write_bytes(b"")
    for path, time in ((first, 3), (second, 2), (damaged, 4)):
        os.utime(path, (time, time))
    assert load._find_kernels() == (first, "")
    os.utime(second, (5, 5))
    assert load._find_kernels() == (second, "")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners here")
class TestAStrangersFile:
    """Its code would run in our process: in the cache directory, nobody but the user and root may have put it there."""

    @pytest.mark.parametrize("what", ["directory", "library"])
    @pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
    def test_others_can_write(self, what: str, mode: int, place: Path) -> None:
        library = put(b"library", place / name())
        (place if what == "directory" else library).chmod(mode)
        path, why = kernels()
        assert path is None
        assert "can be written by others" in why and f"mode {mode:o}" in why and "chmod go-w" in why

    def test_others_can_replace_the_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shared, place = tmp_path / "shared", tmp_path / "shared" / "torchcalc"
        place.mkdir(parents=True)
        monkeypatch.setattr(files, "directories", lambda: [place])
        library = put(b"library", place / name())
        shared.chmod(0o777)
        path, why = kernels()
        assert path is None
        assert f"{shared} can be written by others" in why
        shared.chmod(0o1777)  # as /tmp is: nobody can rename what is another's
        assert load._find_kernels() == (library, "")

    @pytest.mark.parametrize("what", ["directory", "library"])
    def test_another_owner(self, what: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        library = put(b"library", place / name())
        foreign, ask = place if what == "directory" else library, Path.stat

        def status(path: Path, **options: bool) -> os.stat_result:
            result = ask(path, **options)
            return os.stat_result((*result[:4], os.getuid() + 4321, *result[5:10])) if path == foreign else result

        monkeypatch.setattr(Path, "stat", status)
        path, why = kernels()
        assert path is None
        assert f"belongs to another user (uid {os.getuid() + 4321})" in why and "XDG_CACHE_HOME" in why

    @pytest.mark.usefixtures("unloaded")
    def test_the_nodes_as_well(self, place: Path) -> None:
        put(b"kernels", place / name())
        put(b"nodes", place / files.nodes_name(torch.__version__)).chmod(0o777)
        loaded = load._load()
        assert loaded.kernels == place / name()
        assert loaded.nodes is None and "can be written by others" in loaded.why_no_nodes

    def test_the_package_is_trusted_as_its_python_is(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "PACKAGE", place)
        library = put(b"library", place / name())
        library.chmod(0o775)  # an installer under umask 002
        assert load._find_kernels() == (library, "")
        library.chmod(0o777)
        others_write_python = Path(files.__file__).stat().st_mode & stat.S_IWOTH
        assert ("can be written by others" in kernels()[1]) != bool(others_write_python)


def test_nodes() -> None:
    assert native.nodes(), native.why_no_nodes()
    assert native.why_no_nodes() == ""


@pytest.mark.usefixtures("unloaded")
def test_nodes_are_bound_to_their_torch(place: Path) -> None:
    put(b"kernels", place / name())
    put(b"nodes", place / files.nodes_name("2.99.0+cpu"))
    loaded = load._load()
    assert loaded.kernels is not None and loaded.nodes is None
    assert (
        "not built for this torch" in loaded.why_no_nodes and torch.__version__.replace("+", "_") in loaded.why_no_nodes
    )
    assert REMEDY in loaded.why_no_nodes


def test_a_library_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = native.library()
    assert loaded is not None
    monkeypatch.setenv("TORCHCALC_NATIVE_LIBRARY", str(tmp_path / "none.so"))
    path, why = kernels()
    assert path is None and "is not a file" in why

    other = tmp_path / "other.so"
    monkeypatch.setenv("TORCHCALC_NATIVE_LIBRARY", str(other))
    other.write_bytes(loaded.read_bytes().replace(files.source_hash().encode(), b"0" * 16))
    path, why = kernels()
    assert path is None and "other sources" in why

    other.write_bytes(loaded.read_bytes())
    assert load._find_kernels() == (other, "")

    put(loaded.read_bytes(), other).write_bytes(loaded.read_bytes()[:-1])
    path, why = kernels()
    assert path is None and "damaged" in why


def test_trouble_while_looking_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise PermissionError("csrc is locked")

    monkeypatch.setattr(files, "pattern", broken)
    monkeypatch.setattr(load, "_loaded", None)
    assert not native.available()
    assert "csrc is locked" in native.why_not()


# Parent and child both step. The tensors are large enough for two threads and the pool is in use before the fork, so any of
# torch's own operations on them would hang in the child: they are made before it and checked without torch.
FORK = """
import os, signal, torch
from torchcalc import native
from torchcalc.native.optim import DONE, Bound, grad_norm
torch.set_num_threads(2)
x = torch.randn(600, 600)
(x @ x).exp()                                         # the parent's pool has threads
p, g = torch.full((200_000,), 3.0), torch.ones(200_000)
values = p.numpy()
def step():
    before = values[0]
    assert Bound([p], []).sgd_([g], lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False) == DONE
    assert (values == before - 0.5).all()
    assert grad_norm([g]) == (200_000.0, True)
if BEFORE:
    assert native.available(), native.why_not()
    step()
child = os.fork()
if child == 0:
    signal.alarm(60)                                  # a child that hangs must not outlive the test
    assert native.available(), native.why_not()
    step()
    os._exit(7)
_, status = os.waitpid(child, 0)
assert native.available()
step()
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("before", [True, False], ids=["loaded before the fork", "loaded by the child"])
def test_a_forked_child_steps(before: bool) -> None:
    assert run(f"BEFORE = {before}{FORK}") == "7"


# The first step in a child: the driver makes its state there, by torch's own operations.
FIRST = """
import os, signal, torch
import torchcalc
from torchcalc import native
torch.set_num_threads(2)
x = torch.randn(600, 600)
(x @ x).exp()
def optimizer(**options):
    p = torch.nn.Parameter(torch.full((200_000,), 3.0))
    p.grad = torch.ones(200_000)
    return p, getattr(torchcalc.optim, NAME)([p], lr=0.5, **OPTIONS, **options)
if BEFORE:
    optimizer()[1].step()
(p, first), (q, loaded) = optimizer(), optimizer()
state = loaded.state_dict()
child = os.fork()
if child == 0:
    signal.alarm(60)
    first.step()
    loaded.load_state_dict(first.state_dict())
    loaded.step()
    assert native.available(), native.why_not()
    os._exit(7 if abs(float(p[-1]) - 2.5) < 1e-6 and float(q[-1]) < 3 else 1)
_, status = os.waitpid(child, 0)
first.step()
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {"momentum": 0.9}), ("AdamW", {"weight_decay": 0}), ("Adam", {"amsgrad": True, "max_norm": 1e9})],
    ids=["SGD", "AdamW", "Adam"],
)
@pytest.mark.parametrize("before", [True, False], ids=["loaded before the fork", "loaded by the child"])
def test_an_optimizers_first_step_in_a_forked_child(before: bool, name: str, options: dict[str, float]) -> None:
    assert run(f"BEFORE, NAME, OPTIONS = {before}, {name!r}, {options}{FIRST}") == "7"


WORKERS = """
import torch
from torch.utils.data import DataLoader
from torchcalc import native
from torchcalc.native.optim import DONE, Bound
torch.set_num_threads(2)
assert native.available(), native.why_not()
options = dict(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False)
p, g = [torch.ones(200_000)], [torch.ones(200_000)]
assert Bound(p, []).sgd_(g, **options) == DONE
class Steps(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        q = [torch.full((200_000,), float(i))]
        assert Bound(q, []).sgd_(g, **options) == DONE
        return q[0].mean()
for epoch in range(2):
    print(torch.cat(list(DataLoader(Steps(), num_workers=2, multiprocessing_context="fork"))).tolist())
    assert Bound(p, []).sgd_(g, **options) == DONE
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_data_loader_workers_after_a_step() -> None:
    assert run(WORKERS) == "\n".join(["[-0.5, 0.5, 1.5, 2.5]"] * 2)


# What each instruction set computes, as one number per result.
DIGESTS = """
import hashlib, torch
from torchcalc import native
from torchcalc.native.optim import DONE, Bound, grad_norm
assert native.available(), native.why_not()
print(torch.ops.torchcalc.instruction_set())
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    torch.manual_seed(1)
    shape = (20_011,)
    p, g, m, v, x = ([torch.randn(shape).to(dtype)] for _ in range(5))
    v[0].abs_(), x[0].abs_()
    print("norm", dtype, *grad_norm(g))
    # One rounding a product: the same with and without fused multiply-adds
    assert Bound(q := [p[0].clone()], []).sgd_(g, lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False) == DONE
    print("sgd", dtype, hashlib.sha256(q[0].view(torch.uint8).numpy()).hexdigest())
    for seed in (None, 3):
        state = [[t.clone() for t in part] for part in (p, m, v, x)]
        steps = [torch.tensor(2.0)]
        options = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, decoupled=True)
        assert Bound(state[0], sum(state[1:], []), steps).adam_(g, **options, seed=seed) == DONE
        digest = hashlib.sha256(b"".join(part[0].view(torch.uint8).numpy().tobytes() for part in state)).hexdigest()
        print("fused", dtype, seed, digest)
"""


def test_instruction_sets_agree() -> None:
    output = {name: run(DIGESTS, TORCHCALC_NATIVE_ISA=name).splitlines() for name in ("avx512", "avx2", "baseline")}
    names = {wish: lines[0] for wish, lines in output.items()}
    assert names["baseline"] in ("baseline", "neon")
    best = output["avx512"]
    for wish, lines in output.items():
        fused = names[wish] != "baseline" or names["avx512"] == "baseline"
        rows = zip(best[1:], lines[1:], strict=True)
        assert all(a == b for a, b in rows if fused or not a.startswith("fused")), wish
    if names["avx512"] not in ("baseline", "neon"):
        assert names["avx2"] == "avx2"
        assert output["baseline"][1:] != best[1:]  # the override reached another loop


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx2", "baseline"])
def test_every_instruction_set_passes_the_tests(name: str) -> None:
    tests = [str(Path(__file__).with_name(f"test_{part}.py")) for part in ("optim", "rounding", "grad_norm")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, env={**os.environ, "TORCHCALC_NATIVE_ISA": name}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
