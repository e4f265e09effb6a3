"""What people check: modules with parameters, compiled functions, operators of torch.library, kernels, from pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.testing.defects import cube
from torchcalc.testing import check_function

X = torch.linspace(-1, 1.5, 12).reshape(4, 3)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight + bias

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:  # the line that reports name
        x, weight = ctx.saved_tensors
        return grad_output * weight, (grad_output * x).sum(0), 2 * grad_output.sum(0)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output * ctx.saved_tensors[0]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor([1.0, -2.0, 0.5])), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(3, 3), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.first(x).tanh())  # type: ignore[no-any-return]


def test_a_modules_wrong_gradient_is_named_by_its_parameter_and_by_file_and_line() -> None:
    found = check_function(Net(), X, include=["gradient"], progress=False)["gradient"]
    assert (found.verdict, found.cause) == ("error", "constant ratio 2")
    assert "(scale.bias)" in found.diagnosis
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "the line that reports name" in text)
    place = f"Scaled.backward, {__file__}:{line - 1}"  # its decorator's
    assert found.details["backward"] == place
    assert found.diagnosis.endswith(place)


RIGHT = (
    ("an mlp", nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)), X),
    ("an operator", cube, X),
    ("its overload packet", torch.ops.torchcalc_test.cube, X),
)
COMPILED = (
    ("a compiled function", lambda: torch.compile(lambda x: x.sin() * x), X),
    ("a compiled module", lambda: torch.compile(nn.Linear(3, 2)), X),
)


@pytest.mark.parametrize(("name", "fn", "x"), RIGHT, ids=[row[0] for row in RIGHT])
def test_right_ones_have_no_errors(name: str, fn: Any, x: Tensor) -> None:
    report = check_function(fn, x, progress=False)
    assert report, str(report)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "make", "x"), COMPILED, ids=[row[0] for row in COMPILED])
def test_compiled_ones_have_no_errors(name: str, make: Any, x: Tensor) -> None:
    report = check_function(make(), x, progress=False)
    torch._dynamo.reset()
    assert report, str(report)


def test_what_torch_drops_without_a_word_is_said_so() -> None:
    found = check_function(cube, X, include=["forward mode"], progress=False)["forward mode"]
    assert found.verdict == "note"
    assert found.diagnosis.startswith("through an operator of torch.library torch gives no tangent")


class Racy:
    """Now and then a number is off: by much, or by rounding."""

    def __init__(self, off: float) -> None:
        self.off, self.calls = off, [0]

    def __call__(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return x * (1 + self.off * (self.calls[0] % 7 == 0))


@pytest.mark.parametrize(
    ("off", "verdict", "cause"),
    [(1e-2, "error", "a race"), (1e-7, "note", "not the same bits"), (0.0, "ok", "")],
)
def test_a_race_shows_in_twenty_calls(off: float, verdict: str, cause: str) -> None:
    found = check_function(Racy(off), X, include=["races"], progress=False)["races"]
    assert found.verdict == verdict, found
    assert cause in found.cause


def wants_alignment(x: Tensor) -> Tensor:
    """Reads four elements at once, from the address below."""
    lost = x.storage_offset() % 2
    return x.exp() if not lost else torch.as_strided(x, x.shape, x.stride(), x.storage_offset() - 1).exp()


def test_one_element_off_alignment_is_tried() -> None:
    found = check_function(wants_alignment, X, include=["layouts"], progress=False)["layouts"]
    assert found.verdict == "error"
    assert "one element off alignment" in found.cause


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_kernel_on_the_wrong_stream_is_found() -> None:
    def on_the_default_stream(x: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.default_stream()):
            return x * 2

    x = X.cuda()
    wrong = check_function(on_the_default_stream, x, include=["streams"], progress=False)["streams"]
    assert (wrong.verdict, wrong.cause) == ("error", "runs on another stream than the current one")
    assert check_function(torch.sin, x, progress=False)


def test_a_dtensor_is_refused_in_one_sentence(tmp_path: Path) -> None:
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path / 'store'}")
    try:
        x = DTensor.from_local(X, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match="input 0 is a DTensor, of which each process holds a part"):
            check_function(torch.sin, x)
    finally:
        torch.distributed.destroy_process_group()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_the_pytest_plugin_costs_nothing_without_its_flag() -> None:
    code = "import pytest_torchcalc, sys; print('torch' in sys.modules, 'torchcalc' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False False"


PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-q", "-rf")


@pytest.mark.slow
def test_pytest_checks_what_its_flag_names() -> None:
    both = ("--check-function", "torch:sin", "--check-function", "tests.testing.test_uses:Halved")
    result = run(*PYTEST, *both, "--check-input", "3")
    assert result.returncode == 1
    assert "FAILED ::tests.testing.test_uses:Halved[gradient]" in result.stdout
    assert "FAILED ::torch:sin" not in result.stdout
    assert "[constant ratio 0.5]" in result.stdout
    assert "Halved.backward, " in result.stdout
    unknown = run(*PYTEST, "--check-function", "torch:nonsense")
    assert unknown.returncode == 4
    assert "cannot find 'torch:nonsense'" in unknown.stderr
