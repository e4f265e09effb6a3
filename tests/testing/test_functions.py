"""check_function and check_loss find planted mistakes, name their causes, and let right functions pass."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import stock
from tests.testing.defects import DEFECTS, Defect, second, unary, x, y
from tests.testing.right import RIGHT, Right, classes, normal
from torchcalc.testing import assert_function, check_function, check_loss, pytest_function, pytest_loss
from torchcalc.testing.__main__ import main
from torchcalc.testing.report import Report

QUICK = (
    "torch.",
    "relu",
    "gelu",
    "abs",
    "complex exp",
    "mul",
    "amax",
    "linear",
    "nn.PReLU",
    "dropout",
    "mse_loss",
    "cross_entropy",
)


def named(rows: list[Any]) -> list[Any]:
    return [pytest.param(row, id=row.name.replace(" ", "-")) for row in rows]


def report_of(row: Right | Defect, **options: Any) -> Report:
    check = check_loss if row.loss else check_function
    return check(row.fn, *row.inputs, **{**row.options, **options})


def gradcheck(row: Defect) -> str:
    """What torch.autograd.gradcheck says of it."""
    inputs = [
        t.double().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in row.inputs
    ]
    try:
        torch.autograd.gradcheck(row.fn, inputs)
    except Exception as error:
        return str(error).strip().partition("\n")[0][:60]
    return "passes"


@pytest.mark.parametrize("defect", named(DEFECTS))
def test_defect_is_found_and_its_cause_named(defect):
    found = report_of(defect, include=[defect.check])[defect.check]
    assert found.verdict == defect.verdict
    assert defect.cause in found.cause
    assert found.diagnosis


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # gradcheck and the defects themselves warn
def test_all_checks_of_all_defects(capsys):
    lines = []
    for defect in DEFECTS:
        report = report_of(defect)
        found = report[defect.check]
        assert found.verdict == defect.verdict, str(report)
        assert defect.cause in found.cause, str(report)
        lines.append(f"{defect.name:28} {found.check:25} {found.cause[:60]:60} gradcheck: {gradcheck(defect)}")
    with capsys.disabled():
        passed = sum(line.endswith("gradcheck: passes") for line in lines)
        print(f"\n{len(lines)} planted defects, all found; gradcheck passes {passed} of them", *lines, sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("right", named(RIGHT))
def test_right_function_has_no_error(right):
    report = report_of(right)
    assert report, str(report)


@pytest.mark.parametrize("right", named([r for r in RIGHT if r.name in QUICK]))
def test_right_function_has_no_error_quick(right):
    report = report_of(right, compile=False)
    assert report, str(report)


def test_there_are_enough_of_both():
    assert len(DEFECTS) >= 60
    assert len(RIGHT) >= 100


class TestWrongInStockTorch:
    """What stock torch 2.13 and 2.14.1 get wrong is found; once it is mended, the expectation is to be removed."""

    def test_batch_norm_ignores_strides_of_weight_in_backward(self):
        def batch_norm(a, w, b):
            return F.batch_norm(a, None, None, w, b, training=True)

        report = check_function(batch_norm, x, normal(4, seed=1), normal(4, seed=2), include=["gradient", "layouts"])
        assert report["gradient"].verdict == "ok"
        assert report["layouts"].cause.startswith("breaks when w is non-contiguous")

    @pytest.mark.skipif(not stock.HAS_LINEAR_CROSS_ENTROPY, reason="came with torch 2.13")
    def test_forward_mode_of_chunked_linear_cross_entropy(self):
        options = torch.nn.modules.loss.LinearCrossEntropyOptions()
        loss = partial(F.linear_cross_entropy, options=options)
        report = check_loss(
            loss,
            normal(5, 4),
            normal(3, 4, seed=1),
            classes(5, high=3),
            include=["gradient", "forward mode", "second derivative"],
        )
        assert report["gradient"].verdict == "ok"
        assert report["forward mode"].cause == "forward derivative silently zero"
        assert report["second derivative"].cause == "first derivative right, second derivative silently zero"


class TestReport:
    half = staticmethod(unary(lambda a: a, second))

    def test_diagnosis_names_place_values_and_error_bar(self):
        slip = unary(lambda a: torch.where(a == 3, 1.0, 2.0) * a, second)
        report = check_function(slip, torch.tensor([1.0, 3.0, -2.0]), include=["gradient"])
        details = report["gradient"].details
        assert details["index"] == [1]
        assert abs(details["ratio"] - 0.5) < 1e-9
        assert abs(details["analytic"] / details["numeric"] - 0.5) < 1e-9
        assert 0 < details["error_bar"] < 1e-8
        assert "1 of 3 elements differ; worst at [1]" in str(report)

    def test_assert_raises_with_the_report(self):
        with pytest.raises(AssertionError, match=r"constant ratio 0\.5"):
            assert_function(self.half, x)

    def test_json(self):
        findings = json.loads(check_function(self.half, x, include=["gradient", "leaks"]).json())["findings"]
        assert [f["verdict"] for f in findings] == ["error", "ok"]

    def test_kink_is_named_and_left_out(self):
        report = check_function(torch.relu, torch.tensor([0.0, 1.0, -1.0]), include=["gradient", "kinks"])
        assert report
        assert "kinks left out: input 0 [0] = 0" in report["gradient"].figure
        assert "kinks at 0" in report["kinks"].figure


def test_inputs_modules_and_generator_are_left_alone():
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    a = normal(5, 4).requires_grad_()
    before = [t.detach().clone() for t in (a, *module.state_dict().values())]
    state = torch.get_rng_state()
    check_function(module, a, include=["gradient", "determinism", "mutation"])
    check_function(partial(F.dropout, p=0.5), a)
    assert torch.equal(torch.get_rng_state(), state)
    assert a.grad is None
    assert all(p.grad is None for p in module.parameters())
    assert all(map(torch.equal, before, (a.detach(), *module.state_dict().values())))


def test_reports_are_the_same_each_time():
    first, again = (check_function(torch.sin, x, exclude=["leaks"]).json() for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_function(torch.sin, torch.arange(3)), "no example input is a float tensor"),
        (lambda: check_function(torch.mul, x, 2.0, wrt=(1,)), r"wrt=\(1,\)"),
        (lambda: check_function(torch.sin, x, include=["gradeint"]), "there is no check 'gradeint'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrt_leaves_an_input_out():
    fn = lambda a, b: a * b.detach()  # noqa: E731
    assert not check_function(fn, x, y, include=["differentiable"])
    assert check_function(fn, x, y, wrt=(0,), include=["differentiable", "gradient", "subsets"])


test_square = pytest_function(torch.square, x, include=["gradient", "leaks"])
test_mse = pytest_loss(torch.nn.MSELoss(), x, y, include=["reductions", "gradient"])


def test_pytest_helper_fails_just_the_check_of_a_defect():
    test: Any = pytest_function(TestReport.half, x, include=["gradient", "leaks", "reference"])
    checks = {check.name: check for check in test.pytestmark[0].args[1]}
    test(checks["leaks"])
    with pytest.raises(AssertionError, match=r"constant ratio 0\.5"):
        test(checks["gradient"])
    with pytest.raises(pytest.skip.Exception, match="no reference"):
        test(checks["reference"])


class TestCommand:
    def test_right_function(self, capsys):
        assert main(["torch:sin", "--input", "5", "--include", "gradient,adjoint"]) == 0
        assert "0 errors, 2 held" in capsys.readouterr().out

    def test_loss_as_json(self, capsys):
        arguments = [
            "torch.nn:CrossEntropyLoss",
            "--input",
            "5,3",
            "--input",
            "5:classes=3",
            "--include",
            "reductions",
            "--json",
        ]
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["findings"][0]["figure"] == "N = elements"

    def test_defect_of_a_file_in_this_folder(self, capsys, monkeypatch, tmp_path: Path):
        (tmp_path / "mine_with_a_mistake.py").write_text("import torch\ndef f(x, y):\n    return x * y.detach()\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert main(["mine_with_a_mistake:f", "--input", "3", "--input", "3", "--include", "differentiable"]) == 1
        assert "None returned for input 1 (y)" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["torch.sin"], "package.module:name"),
            (["torch:sinn"], "cannot find 'torch:sinn'"),
            (["torch:sin", "--input", "3;4"], "'3;4' is no input"),
            (["torch:sin", "--input=-1,4"], "'-1,4' is no input"),
            (["torch:sin", "--input", "5,,3"], "'5,,3' is no input"),
            (["torch:sin", "--input", "5:classes=0"], "'5:classes=0' is no input"),
            (["torch:sin", "--wrt", "first"], "--wrt first: give the inputs' numbers"),
            (["torch:sin", "--include", "nothing"], "there is no check 'nothing'"),
            (["torch:pi"], "'torch:pi' is a float, which cannot be called"),
            (["torch:sin", "--reference", "torch:pi"], "'torch:pi' is a float"),
            (["torch:mm"], "torch:mm raises on inputs of shape (3, 4): TypeError: mm() received an invalid comb"),
            (["torch:numel"], "torch:numel returns no tensor but int"),
            (["torch.nn:Linear"], "torch.nn:Linear() raises TypeError: "),
            (["torch:sin", "--kind", "optimizer"], "no signature found"),
            (["broken_syntax:f"], "cannot import 'broken_syntax': SyntaxError: "),
            (["broken_import:f"], "cannot import 'broken_import': ZeroDivisionError: division by zero"),
            (["broken_exit:f"], "cannot import 'broken_exit': SystemExit: 0"),
            (["broken_call:f"], "broken_call:f raises on inputs of shape (3, 4): KeyError: 'nothing'"),
        ],
    )
    def test_mistakes_are_explained(self, capsys, monkeypatch, tmp_path: Path, arguments, message):
        """In one line, and with another exit status than that of a report with errors."""
        for name, text in {
            "syntax": "def f(:",
            "import": "1 / 0",
            "exit": "raise SystemExit(0)",
            "call": "def f(x):\n    raise KeyError('nothing')",
        }.items():
            (tmp_path / f"broken_{name}.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("torchcalc.testing: ") and message in err
        assert err.count("\n") == 1

    def test_the_trial_call_leaves_inputs_to_the_checks(self, capsys, monkeypatch, tmp_path: Path):
        (tmp_path / "writes_to_its_input.py").write_text("def f(x):\n    return x.add_(1).sin()\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert main(["writes_to_its_input:f", "--input", "3", "--include", "mutation"]) == 1
        assert "mutation" in capsys.readouterr().out

    def test_list(self, capsys):
        assert main(["--list"]) == 0
        out = capsys.readouterr().out
        assert "adjoint" in out
        assert "label smoothing" in out
