"""check_optimizer finds what is wrong, names it, and finds nothing where nothing is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import torchcalc.optim as ours
from tests.testing.planted_optimizers import HooksTwice, PlainAdam, PlainSGD, SwallowsErrors, planted
from torchcalc.testing.optimizers import assert_optimizer, check_optimizer, pytest_optimizer

OLD = torch.__version__ < "2.14"


@dataclass(frozen=True)
class Defect:
    slip: str
    check: str
    cause: str
    base: type[torch.optim.Optimizer] = PlainAdam
    options: dict[str, Any] = field(default_factory=dict)
    verdict: str = "error"

    @property
    def subject(self) -> type[torch.optim.Optimizer]:
        return planted(self.base, self.slip) if self.base in (PlainAdam, PlainSGD) else self.base

    @property
    def reference(self) -> Any:
        return torch.optim.SGD if issubclass(self.base, PlainSGD) else torch.optim.Adam


STRIDES = "strides ignored: elements paired by memory, not by index"
DECAY: dict[str, Any] = dict(weight_decay=0.1)
COUPLED: dict[str, Any] = dict(weight_decay=0.1, decoupled_weight_decay=False)
MOMENTUM: dict[str, Any] = dict(momentum=0.9)
NESTEROV: dict[str, Any] = dict(momentum=0.9, nesterov=True)

DEFECTS = (
    # The rule.
    Defect("no bias correction", "parity", "bias correction missing"),
    Defect("no first bias correction", "parity", "bias correction of the first average missing"),
    Defect("no second bias correction", "parity", "bias correction of the second average missing"),
    Defect("step counted early", "parity", "bias correction off by one: step counted too early"),
    Defect("step counted late", "parity", "bias correction off by one: step counted too late"),
    Defect("eps inside", "parity", "epsilon inside the root"),
    Defect("eps before bias correction", "parity", "epsilon added before the bias correction"),
    Defect("no root", "parity", "second average without the root"),
    Defect("betas swapped", "parity", "betas swapped"),
    Defect("coupled for decoupled", "parity", "weight decay coupled instead of decoupled", options=DECAY),
    Defect("decay after the step", "parity", "weight decay after the step instead of before", options=DECAY),
    Defect("decay without lr", "parity", "weight decay not scaled by lr", options=DECAY),
    Defect("sign", "parity", "sign of the update"),
    Defect("sign", "quadratic", "ascends: sign of the update"),
    Defect("lr applied twice", "parity", "lr applied twice"),
    Defect("lr applied twice", "step size", "lr applied twice"),
    Defect("lr ignored", "step size", "lr ignored"),
    Defect("nesterov without the gradient", "parity", "nesterov without the gradient's own part", PlainSGD, NESTEROV),
    Defect("nesterov ignored", "parity", "nesterov ignored", PlainSGD, NESTEROV),
    Defect(
        "first step damped",
        "parity",
        "dampening applied to the first step",
        PlainSGD,
        dict(momentum=0.9, dampening=0.3),
    ),
    Defect("momentum averages", "parity", "momentum averages (1 − μ) instead of summing", PlainSGD, MOMENTUM),
    Defect("decay after momentum", "parity", "weight decay decoupled instead of coupled", PlainSGD, MOMENTUM | DECAY),
    Defect("decay decoupled", "parity", "weight decay decoupled instead of coupled", PlainSGD, DECAY),
    # Groups and gradients.
    Defect("group options ignored", "groups", "group options ignored: lr"),
    Defect("None is zero", "missing gradients", "gradients of None treated as zero"),
    Defect("one step count for all", "missing gradients", "step or state advanced while there was no gradient"),
    Defect("step kept in the group", "missing gradients", "counted for all parameters together: step"),
    Defect("one buffer for all", "independence", "parameters are coupled", PlainSGD, MOMENTUM, "note"),
    Defect("p.grad written", "gradients kept", "p.grad written"),
    Defect("p.grad decayed", "gradients kept", "p.grad written", options=dict(decoupled_weight_decay=False)),
    Defect("new memory", "in place", "parameter moved in memory"),
    Defect("p.data", "in place", "writes through p.data", verdict="note"),
    Defect("zero_grad does nothing", "zero_grad", "zero_grad(set_to_none=False)"),
    # Closures and hooks.
    Defect("closure without grad", "closure", "closure not under enable_grad"),
    Defect("gradient read before the closure", "closure", "gradients read before the closure ran"),
    Defect("loss not returned", "closure", "loss not returned"),
    Defect("grad mode left off", "closure", "grad mode changed"),
    Defect("closure twice", "closure", "closure evaluated more than once", PlainSGD, verdict="note"),
    Defect("step calls super().step()", "hooks", "hooks run twice", HooksTwice),
    Defect("except Exception", "failing closure", "exception swallowed", SwallowsErrors),
    # What changes between steps.
    Defect("lr cached", "schedulers", "lr read once, by the constructor"),
    Defect("maximize ignored", "maximize", "maximize ignored"),
    Defect("maximize turns the decay round", "maximize", "weight decay negated by maximize", options=COUPLED),
    Defect("group added before it is checked", "group arguments", "changed before it raised"),
    # State.
    Defect("slot outside of the state", "state_dict", "state kept outside of state_dict"),
    Defect("state not pickled", "pickle", "state lost: [0]['step']"),
    Defect("state in float32", "state dtype", "state in a coarser dtype"),
    Defect("loading pops", "state aliasing", "changed by loading"),
    Defect("any groups are loaded", "loading mismatch", "mismatch accepted"),
    # GradScaler.
    Defect("amp: state updated", "found_inf", "momentum or state updated in a skipped step"),
    Defect("amp: step counted", "found_inf", "step counted in a skipped step"),
    Defect("amp: step counted", "grad scaler", "step counted in a skipped step"),
    Defect("amp: not unscaled", "grad scaler", "gradients not unscaled"),
    # Memory and numbers.
    Defect("dense memory assumed", "views", "neighbours of a view overwritten"),
    Defect("dense memory assumed", "layouts", STRIDES),
    Defect("gradient read from memory", "layouts", STRIDES),
    Defect("tail left out", "precisions", "elements unchanged: whole SIMD blocks"),
    Defect("gradient scaled in place", "expanded gradients", "raises RuntimeError", PlainSGD),
    Defect("duplicates not summed", "sparse", "duplicate indices not summed first", PlainSGD),
    Defect("square of complex", "complex", "not finite"),
    Defect("empty tensors", "shapes", "raises RuntimeError", verdict="note"),
    # The same however it is computed.
    Defect("foreach halves", "implementations", "constant ratio 0.5", PlainSGD),
    Defect("buffer detached", "differentiable", "derivative through the step", PlainSGD, MOMENTUM),
    Defect("noise", "determinism", "differs from run to run, with torch's generators seeded"),
)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: f"{d.slip}-{d.check}".replace(" ", "_"))
def test_a_planted_defect_is_found_and_named(defect: Defect) -> None:
    finding = check_optimizer(
        defect.subject, defect.reference, options=defect.options, include=[defect.check], progress=False
    )[defect.check]
    assert (finding.verdict, finding.cause) == (defect.verdict, defect.cause), finding.diagnosis
    assert finding.diagnosis


@pytest.mark.parametrize(
    ("base", "reference", "options"),
    [(PlainAdam, torch.optim.Adam, {}), (PlainAdam, torch.optim.Adam, COUPLED), (PlainSGD, torch.optim.SGD, NESTEROV)],
    ids=["Adam", "Adam with coupled decay", "SGD with nesterov"],
)
def test_without_a_slip_the_same_code_has_no_errors(base: Any, reference: Any, options: dict[str, Any]) -> None:
    report = check_optimizer(base, reference, options=options, progress=False)
    assert report, str(report)


# Stock torch's own defects: numbers 1 to 7 are right in torchcalc.optim, 8 on request (tests/optim/test_defects.py).

AMP: dict[str, Any] = dict(fused=True, lr=0.1, momentum=0.9)
STOCK = (
    # (number, class, options, check, verdict, cause, whether this torch still has it)
    (1, torch.optim.SGD, dict(fused=True, lr=0.1), "precisions", "error", "elements unchanged: whole SIMD blocks", OLD),
    (2, torch.optim.SGD, dict(fused=True, lr=0.1), "layouts", "error", STRIDES, True),
    (2, torch.optim.Adam, dict(fused=True), "layouts", "error", STRIDES, True),
    (2, torch.optim.AdamW, dict(fused=True), "views", "error", "neighbours of a view overwritten", True),
    (3, torch.optim.SGD, AMP, "grad scaler", "error", "uninitialised state kept by a skipped step", True),
    (3, torch.optim.SGD, AMP, "found_inf", "error", "uninitialised state kept by a skipped step", True),
    (4, torch.optim.SGD, AMP, "missing gradients", "error", "a missing or late gradient raises", True),
    (5, torch.optim.AdamW, {}, "state aliasing", "note", "state aliased after load", True),
    (5, torch.optim.AdamW, {}, "loading keeps foreach", "note", "constructor's foreach/fused lost by loading", True),
    (5, torch.optim.AdamW, {}, "loading keeps dtypes", "note", "state rounded by loading", True),
    (6, torch.optim.AdamW, {}, "differentiable", "note", "float32 bias correction in float64", True),
    (7, torch.optim.SGD, {}, "arguments", "note", "nonsense accepted", True),
    (7, torch.optim.AdamW, {}, "group arguments", "note", "nonsense accepted in a group", True),
    (7, torch.optim.AdamW, dict(foreach=False), "tensor lr", "note", "tensor lr shared between groups", True),
    (7, torch.optim.AdamW, {}, "group keys", "note", "misspelt option accepted", True),
    (8, torch.optim.AdamW, {}, "bfloat16 progress", "note", "bfloat16 weights stall", True),
    # Beyond the eight: autograd's graph is cut where the momentum buffer starts; foreach adds the momentum to p.grad.
    (9, torch.optim.SGD, dict(momentum=0.9), "differentiable", "error", "derivative through the step", True),
    (10, torch.optim.SGD, dict(foreach=True) | NESTEROV, "gradients kept", "error", "p.grad written", True),
)  # fmt: skip


@pytest.mark.parametrize(
    ("number", "cls", "options", "check", "verdict", "cause", "present"),
    STOCK,
    ids=[f"{number}-{cls.__name__}-{check}" for number, cls, _, check, *_ in STOCK],
)
def test_the_defects_of_stock_torch_are_found(
    number: int, cls: Any, options: dict[str, Any], check: str, verdict: str, cause: str, present: bool
) -> None:
    finding = check_optimizer(cls, options=options, include=[check], progress=False)[check]
    expected = (verdict, cause) if present else ("ok", "")
    assert (finding.verdict, finding.cause) == expected, finding.diagnosis


LOOP: dict[str, Any] = dict(foreach=False)

#: Errors of stock classes over all their ways on CPU, in 2.13.0 and 2.14.1. All are of fused=True, but that foreach SGD
#: with nesterov writes into p.grad, and that differentiable SGD cuts the graph where its momentum starts.
DENSE_ONLY = {"layouts", "views", "expanded gradients"}
SGD_ERRORS = {*DENSE_ONLY, "implementations", "gradients kept", *({"precisions"} if OLD else ())}
EXPECTED: tuple[tuple[Any, dict[str, Any], set[str]], ...] = (
    (torch.optim.Adam, {}, DENSE_ONLY),
    (torch.optim.AdamW, {}, DENSE_ONLY),
    (torch.optim.Adagrad, {}, DENSE_ONLY),
    (torch.optim.SGD, {}, SGD_ERRORS),
    (
        torch.optim.SGD,
        dict(momentum=0.9),
        {
            *SGD_ERRORS,
            "missing gradients",
            "unfreezing",
            "grad scaler",
            "found_inf",
            "differentiable",
        },
    ),
    *((getattr(torch.optim, name), {}, set()) for name in ("RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD")),
    (torch.optim.Rprop, {}, set()),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options", "errors"), EXPECTED, ids=[f"{c.__name__}({','.join(o)})" for c, o, _ in EXPECTED]
)
def test_stock_classes_have_the_errors_that_are_listed(cls: Any, options: dict[str, Any], errors: set[str]) -> None:
    report = check_optimizer(cls, options=options, progress=False)
    assert {f.check for f in report.errors} == errors, str(report)


RIGHT: tuple[tuple[Any, Any, dict[str, Any]], ...] = (
    *((getattr(torch.optim, name), getattr(torch.optim, name), LOOP) for name in (
        "SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop",
    )),
    *((getattr(ours, name), getattr(torch.optim, name, None), {}) for name in (
        "SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop", "Lion",
        "GradientDescent",
    )),
    (ours.SGD, torch.optim.SGD, NESTEROV),
    (ours.SGD, torch.optim.SGD, dict(momentum=0.9, dampening=0.3, weight_decay=0.1, fused=True)),
    (ours.Adam, torch.optim.Adam, dict(amsgrad=True, weight_decay=0.1, foreach=True)),
    (ours.AdamW, torch.optim.AdamW, dict(maximize=True)),
    (ours.AdamW, torch.optim.AdamW, dict(fused=True)),
    (ours.RMSprop, torch.optim.RMSprop, dict(centered=True, momentum=0.9)),
    (ours.AdamW, torch.optim.AdamW, dict(rounding="stochastic")),
    (ours.SGD, torch.optim.SGD, dict(skip_nonfinite=True)),
    (ours.GradientDescent, None, dict(backtrack=True)),
)  # fmt: skip
#: What of torchcalc's own optimizers is weak: as in torch by default, or of the method.
OWN_NOTES = {"bfloat16 progress", "float16 range", "closure"}
#: Torch's have them too: the lr of an average's step is set one step before, and that of Rprop is for the first step alone.
OWN_NOTES_OF: dict[Any, set[str]] = {ours.ASGD: {"schedulers"}, ours.Rprop: {"changed lr"}}
QUICK = (torch.optim.AdamW, ours.SGD, ours.AdamW)


@pytest.mark.parametrize(
    ("cls", "reference", "options"),
    [
        pytest.param(*row, marks=() if row[0] in QUICK and set(row[2]) <= {"foreach"} else pytest.mark.slow)
        for row in RIGHT
    ],
    ids=[f"{c.__module__.partition('.')[0]}-{c.__name__}-{','.join(o)}" for c, _, o in RIGHT],
)
def test_right_optimizers_have_no_errors(cls: Any, reference: Any, options: dict[str, Any]) -> None:
    report = check_optimizer(cls, reference, options=options, progress=False)
    assert report, str(report)
    assert sum(f.verdict == "ok" for f in report) > 20
    if cls.__module__.startswith("torchcalc"):
        assert {f.check for f in report.notes} <= OWN_NOTES | OWN_NOTES_OF.get(cls, set()), str(report)


# The ways of calling it.


def test_a_rule_in_float64_is_a_reference() -> None:
    def rule(p: Tensor, gradients: list[Tensor], *, lr: float, maximize: bool = False) -> Tensor:
        for g in gradients:
            p = p + lr * g if maximize else p - lr * g
        return p

    good = check_optimizer(ours.GradientDescent, rule, include=["parity"], progress=False)["parity"]
    assert good.verdict == "ok"
    bad = check_optimizer(planted(PlainAdam, ""), rule, include=["parity"], progress=False)["parity"]
    assert bad.verdict == "error"


def test_a_factory_of_parameters_alone_is_a_subject() -> None:
    report = check_optimizer(
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False),
        exclude=["rosenbrock"],
        progress=False,
    )
    assert report, str(report)
    assert report["groups"].verdict == "ok"
    assert report["threshold"].figure == "lr·λ = 3.8, derived"  # 2(1 + μ)


def test_assert_raises_with_the_report() -> None:
    with pytest.raises(
        AssertionError, match=r"\[lr applied twice\]\n +with 2·lr the first update is 4 times as long, not twice"
    ):
        assert_optimizer(planted(PlainAdam, "lr applied twice"), include=["step size"], progress=False)


def test_the_random_numbers_of_the_caller_are_left_alone() -> None:
    before = torch.get_rng_state()
    options, include = dict(rounding="stochastic"), ["determinism", "bfloat16 progress", "precisions", "state_dict"]
    reports = [check_optimizer(ours.AdamW, options=options, include=include, progress=False) for _ in "ab"]
    assert torch.equal(before, torch.get_rng_state())
    assert reports[0] == reports[1]


def test_an_option_that_autograd_would_not_record_is_refused_beside_differentiable() -> None:
    for options in (dict(max_norm=1.0), dict(rounding="stochastic")):
        finding = check_optimizer(ours.SGD, options=options, include=["differentiable"], progress=False)[
            "differentiable"
        ]
        assert finding.verdict == "skipped"
        assert "differentiable=True does not go with max_norm or rounding='stochastic'" in finding.diagnosis


def test_a_given_threshold_is_checked() -> None:
    for threshold, verdict in ((2.0, "ok"), (1.9, "error"), (2.1, "error")):
        report = check_optimizer(torch.optim.SGD, threshold=threshold, include=["threshold"], progress=False)
        assert report["threshold"].verdict == verdict


def test_what_cannot_be_built_is_said_so() -> None:
    class NeedsLr(PlainSGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr)

    with pytest.raises(ValueError, match=r"pass what it needs as options=dict\(lr=\.\.\.\)"):
        check_optimizer(NeedsLr)
    assert check_optimizer(NeedsLr, options=dict(lr=0.1), include=["groups"], progress=False)
    with pytest.raises(ValueError, match="cannot take a step by a dense gradient"):
        check_optimizer(torch.optim.SparseAdam)
    with pytest.raises(ValueError, match="the check 'differentiable' tries it"):
        check_optimizer(ours.SGD, options=dict(differentiable=True))
    with pytest.raises(TypeError, match=r"is no torch\.optim\.Optimizer"):
        check_optimizer(lambda params: params)  # type: ignore[arg-type, return-value]


def test_the_whole_class_is_checked_unless_the_options_pin_a_way() -> None:
    assert check_optimizer(torch.optim.AdamW, options=LOOP, include=["views"], progress=False)
    finding = check_optimizer(torch.optim.AdamW, include=["views"], progress=False)["views"]
    assert finding.verdict == "error"
    assert "with fused=True" in finding.diagnosis


test_one_line = pytest_optimizer(ours.SGD, torch.optim.SGD, options=MOMENTUM, include=["parity", "groups", "sparse"])


def test_one_line_makes_a_test_of_each_check() -> None:
    def outcomes(cls: Any) -> dict[str, str]:
        test = pytest_optimizer(cls, include=["groups", "sparse", "in place", "parity"])
        (mark,) = test.pytestmark  # type: ignore[attr-defined]
        seen = {}
        for check, name in zip(mark.args[1], mark.kwargs["ids"], strict=True):
            try:
                test(check)
            except AssertionError as failure:
                seen[name] = str(failure)
            except pytest.skip.Exception as reason:
                seen[name] = f"skipped: {reason}"
            else:
                seen[name] = "passed"
        return seen

    right = outcomes(PlainAdam)
    refusal = "skipped: it refuses sparse gradients: PlainAdam does not support sparse gradients"
    assert right == {
        "groups": "passed",
        "sparse": refusal,
        "in_place": "passed",
        "parity": "skipped: no reference given",
    }
    wrong = outcomes(planted(PlainAdam, "group options ignored"))
    assert "[group options ignored: lr]" in wrong.pop("groups")
    assert wrong == {k: v for k, v in right.items() if k != "groups"}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [torch.optim.AdamW, ours.AdamW])
def test_compiled_steps(cls: Any) -> None:
    finding = check_optimizer(cls, include=["compile"], progress=False)["compile"]
    assert finding.verdict == "ok", finding.diagnosis
