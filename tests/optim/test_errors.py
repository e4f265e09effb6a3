"""Bad arguments: torch's exception and torch's words first, then the remedy; and nothing is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.cases import CASES, TWINS, Case, build, each, gradients, parameters, run, same, snapshot
from torchcalc import optim as ours

NAN, INF = math.nan, math.inf
TWO = torch.ones(2)

#: What torch refuses. A row holds for every optimizer that knows all of its options.
REFUSED: list[dict[str, Any]] = [
    dict(lr=-1.0),
    dict(lr=TWO),
    dict(lr=torch.tensor(-1.0)),
    dict(lr=None),
    dict(lr="0.1"),
    dict(momentum=-0.1),
    dict(weight_decay=-0.1),
    dict(eps=-1e-8),
    dict(betas=(-0.1, 0.9)),
    dict(betas=(0.9, 1.0)),
    dict(betas=(2, 2)),
    dict(betas=(NAN, 0.9)),
    dict(alpha=-0.1, centered=False),
    dict(lr_decay=-0.1),
    dict(rho=-0.1),
    dict(rho=1.1),
    dict(etas=(0.0, 1.2)),
    dict(etas=(0.5, 1.0)),
    dict(initial_accumulator_value=-0.1),
    dict(momentum_decay=-0.1),
    dict(nesterov=True),
    dict(nesterov=True, momentum=0.9, dampening=0.1),
    dict(fused=True, differentiable=True),
    dict(fused=True, foreach=True),
    # Adam's tensors.
    dict(amsgrad=True, lr=torch.tensor(0.1), foreach=True),
    dict(amsgrad=True, betas=(torch.tensor(0.9), 0.9)),
    dict(amsgrad=True, betas=(0.9, torch.tensor(0.9))),
    dict(amsgrad=True, betas=(torch.tensor(0.9), torch.tensor(0.9)), foreach=True),
    # The first of several is told.
    dict(lr=-1.0, weight_decay=-1.0),
    dict(lr=-1.0, betas=(2.0, 2.0), eps=-1.0),
    dict(betas=(2.0, 2.0), weight_decay=-1.0),
]

#: Nonsense that torch takes (defect 7), and that ours refuses in the constructor and in every group.
NONSENSE: list[dict[str, Any]] = [
    dict(lr=NAN),
    dict(lr=INF),
    dict(lr=torch.tensor(INF)),
    dict(weight_decay=NAN),
    dict(weight_decay=INF),
    dict(momentum=NAN),
    dict(dampening=NAN),
    dict(eps=INF),
    dict(alpha=INF),
    dict(lr_decay=INF),
    dict(lambd=NAN),
    dict(alpha=NAN),
    dict(step_sizes=(1.0, 0.1)),
    dict(momentum_decay=INF),
    dict(initial_accumulator_value=INF),
    dict(betas=(0.9, 0.9, 0.9)),
]

#: Rows of REFUSED that torch does not look at in groups.
IN_GROUPS = [bad for bad in REFUSED if not ({"nesterov", "fused", "foreach", "amsgrad"} & bad.keys())]


def knows(case: Case, bad: dict[str, Any]) -> bool:
    return all(case.takes(option) for option in bad)


def rows(cases: tuple[Case, ...], table: list[dict[str, Any]]) -> Any:
    return pytest.mark.parametrize(
        ("case", "bad"),
        [pytest.param(case, bad, id=f"{case.name}-{bad}") for case in cases for bad in table if knows(case, bad)],
    )


@rows(TWINS, REFUSED)
def test_the_constructor_raises_as_torchs(case: Case, bad: dict[str, Any]) -> None:
    assert case.twin is not None
    with pytest.raises((ValueError, TypeError, RuntimeError)) as stock:
        case.twin(parameters(), **bad)
    with pytest.raises(stock.type) as raised:
        case.cls(parameters(), **bad)
    told, words = str(raised.value), str(stock.value)
    if stock.type is TypeError:  # Python's own words: '<' here, '<=' there
        assert "not supported between instances of" in words
        assert "not supported between instances of" in told
    else:
        assert told.startswith(words)
        assert len(told) > len(words) + 5, "no remedy"


@rows(CASES, NONSENSE)
def test_the_constructor_refuses_nonsense(case: Case, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        case.cls(parameters(), **bad)


@rows(CASES, IN_GROUPS + NONSENSE)
def test_groups_are_checked_before_anything_is_changed(case: Case, bad: dict[str, Any]) -> None:
    params = parameters()
    optimizer = build(case.cls, params, case.configs[0])
    run(optimizer, gradients(params, 2))
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **bad})
    same(snapshot(optimizer), before)
    with pytest.raises((ValueError, TypeError)):
        build(case.cls, [{"params": params, **bad}], case.configs[0])


@each()
def test_integers_are_numbers(case: Case) -> None:
    """torch's Adam refuses betas=(0, 0.9); nothing is wrong with them."""
    config: dict[str, Any] = dict(lr=1)
    if case.takes("betas"):
        config["betas"] = (0, 0.5)
    params, same_params = parameters(), parameters()
    as_floats = {k: tuple(map(float, v)) if isinstance(v, tuple) else float(v) for k, v in config.items()}
    a, b = build(case.cls, params, config), build(case.cls, same_params, as_floats)
    run(a, gradients(params, 3))
    run(b, gradients(params, 3))
    same(params, same_params)


@pytest.mark.parametrize("foreach", [None, True, False])
@each(tuple(case for case in TWINS if not case.sparse))
def test_sparse_gradients_are_refused_in_torchs_words(case: Case, foreach: bool | None) -> None:
    assert case.twin is not None
    ends = []
    for cls in (case.twin, case.cls):
        params = parameters(shapes=((3, 4), (5,)))
        optimizer = build(cls, params, dict(lr=0.1), foreach=foreach)
        run(optimizer, gradients(params, 1, missing=False))
        before = snapshot(optimizer)
        params[0].grad = torch.ones(3, 4)
        params[1].grad = torch.ones(5).to_sparse()
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
        ends.append(raised.value)
        same(snapshot(optimizer), before)
    stock, told = ends
    assert type(told) is type(stock)
    assert str(told).startswith(str(stock))


@pytest.mark.parametrize("how", [dict(device="meta"), dict(dtype=torch.complex64), dict(dtype=torch.int64)], ids=str)
@each(tuple(case for case in CASES if case.takes("fused")))
def test_fused_on_what_is_not_floating_point_is_refused_in_torchs_words(case: Case, how: dict[str, Any]) -> None:
    told = []
    for cls in (torch.optim.AdamW, case.cls):
        p = torch.ones(2, **how)
        optimizer = cls([p], lr=0.1, fused=True)
        p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError) as raised:
            optimizer.step()
        told.append(str(raised.value))
    assert told[1].startswith(told[0].partition(" but ")[0])
    assert str(p.dtype) in told[1]
    assert told[1].endswith("leave fused out")


@each(tuple(case for case in TWINS if case.takes("capturable")))
def test_capturable_on_cpu_is_refused_in_torchs_words(case: Case) -> None:
    assert case.twin is not None
    with pytest.raises(AssertionError) as stock:
        run(build(case.twin, params := parameters(), dict(lr=0.1), capturable=True), gradients(params, 1))
    optimizer = build(case.cls, params := parameters(), dict(lr=0.1), capturable=True)
    with pytest.raises(AssertionError) as raised:
        run(optimizer, gradients(params, 1))
    assert str(raised.value).startswith(str(stock.value))
    same(params, parameters())


@each(tuple(case for case in TWINS if case.takes("capturable")))
def test_a_graph_does_not_capture_a_step_that_is_not_capturable(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's words. Acted with a stream that says it is capturing, and weights that are not on the CPU."""
    assert case.twin is not None
    for module, name in (torch.backends.cuda, "is_built"), (torch.cuda, "is_available"):  # asked before torch 2.12
        monkeypatch.setattr(module, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    stream = type("Stream", (), {"is_capturing": lambda self: True})()
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    told = []
    for cls in (case.twin, case.cls):
        p = nn.Parameter(torch.ones(2, device="meta"))
        optimizer = cls([p], lr=0.1)
        p.grad = torch.ones(2, device="meta")
        with pytest.raises(RuntimeError, match="capturable is False") as raised:
            optimizer.step()
        told.append(str(raised.value))
        assert not optimizer.state[p]
    assert told[0] == told[1]


def test_weight_decay_with_a_sparse_gradient_is_refused_in_torchs_words() -> None:
    for foreach in (None, False, True):
        ends = []
        for cls in (torch.optim.Adagrad, ours.Adagrad):
            p = nn.Parameter(torch.ones(3))
            optimizer = cls([p], weight_decay=0.1, foreach=foreach)
            p.grad = torch.ones(3).to_sparse()
            with pytest.raises(RuntimeError) as raised:
                optimizer.step()
            ends.append(str(raised.value))
            assert p.tolist() == [1.0] * 3
        assert ends[1].startswith("weight_decay option is not compatible with sparse gradients")
        if foreach is False:
            assert ends[1].startswith(ends[0])


@each()
def test_an_unknown_argument_is_a_type_error(case: Case) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        case.cls(parameters(), learning_rate=0.1)


BAD_DESCENT = [
    (dict(shrink=1.0), "Invalid shrink value: 1.0"),
    (dict(shrink=0.0), "Invalid shrink value: 0.0"),
    (dict(armijo=NAN), "Invalid armijo value: nan"),
    (dict(armijo=1.5), "Invalid armijo value: 1.5"),
    (dict(max_trials=0), "Invalid max_trials value: 0"),
]


@pytest.mark.parametrize(("bad", "words"), BAD_DESCENT, ids=str)
def test_gradient_descents_own_arguments(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ours.GradientDescent(parameters(), **bad)
