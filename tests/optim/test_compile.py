"""torch.compile of a step, and of training code around it: eager's results, and no compilation for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from tests.optim.cases import CASES, Case, build, gradients, parameters, run, set_gradients
from torchcalc import optim as ours

STEPS = 6


def each_compiled(configs: bool = False, everyday: tuple[Any, ...] = (ours.AdamW,)) -> Any:
    """Rows of the table. Compiling takes a second: a row or two for everyday, all are among the slow tests."""
    rows = []
    for case in CASES:
        if case.cls is ours.GradientDescent:
            continue  # its step is a loop over a closure's losses, host numbers
        for i, config in enumerate(case.configs if configs else case.configs[:1]):
            daily = case.cls in everyday and i == (1 if configs else 0)
            marks = () if daily else (pytest.mark.slow,)
            rows.append(pytest.param(case, *([config] if configs else []), id=f"{case.name}{i}", marks=marks))
    return pytest.mark.parametrize(["case", "config"] if configs else "case", rows)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_and_eager(
    case: Any, config: dict[str, Any], backend: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[Any], list[Any], list[int]]:
    """Weights and state after every step, compiled and eager, the lr changed by a scheduler; and compilations so far.

    The compiled step always starts from where the eager one stands: what differs is one step's rounding.
    """
    params, mirror = parameters(dtype), parameters(dtype)
    eager, compiled = (
        build(case, params, config, foreach=options.get("foreach", False)),
        build(case, mirror, config, **options),
    )
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (eager, compiled)]
    step = torch.compile(compiled.step, backend=backend)  # after the scheduler has wrapped it
    seen: list[Any] = []
    expected: list[Any] = []
    frames: list[int] = []
    for i, grads in enumerate(gradients(params, STEPS, missing=False)):
        set_gradients(params, grads)
        set_gradients(mirror, grads)
        eager.step()
        step()
        for collected, o, ps in ((expected, eager, params), (seen, compiled, mirror)):
            collected.append([[p.detach().clone(), {k: v.clone() for k, v in o.state[p].items()}] for p in ps])
        for p, q in zip(params, mirror, strict=True):
            q.data.copy_(p)
            for key, x in eager.state[p].items():
                compiled.state[q][key].copy_(x)
        for schedule in schedules:
            schedule.step()
        frames.append(backend.frame_count if isinstance(backend, CompileCounter) else i)
    return seen, expected, frames


def near(seen: Any, expected: Any) -> None:
    """Live scalars divide where numbers multiply: a few roundings of a step."""
    torch.testing.assert_close(seen, expected, rtol=2e-6, atol=2e-7)


@each_compiled(True, everyday=(ours.SGD, ours.AdamW))
def test_a_compiled_step_is_the_eager_step(case: Case, config: dict[str, Any]) -> None:
    seen, expected, frames = compiled_and_eager(case.cls, config, CompileCounter())
    near(seen, expected)
    # Once for the first step, which makes the state, once for the others; once more as lr turns out to change.
    assert frames[-1] <= 3
    assert frames[-1] == frames[2]


@each_compiled(everyday=())
def test_no_more_compilations_than_stock_beyond_the_first_step(case: Case) -> None:
    if case.twin is None:
        return
    *_, mine = compiled_and_eager(case.cls, case.configs[1], CompileCounter())
    torch._dynamo.reset()
    *_, stock = compiled_and_eager(case.twin, case.configs[1], CompileCounter())
    assert mine[-1] <= stock[-1] + 1


@each_compiled(everyday=(ours.SGD,))
def test_a_changing_lr_is_compiled_once(case: Case) -> None:
    """Stock SGD compiles anew for every lr that a scheduler sets, and gives up after eight."""

    def graphs(cls: Any) -> list[int]:
        torch._dynamo.reset()
        counters.clear()
        params = parameters(shapes=((3,),))
        optimizer = cls(params, lr=0.1)
        step, seen = torch.compile(optimizer.step, backend="aot_eager"), []
        for i in range(6):
            optimizer.param_groups[0]["lr"] = 0.1 * 0.9**i
            set_gradients(params, [torch.ones(3)])
            step()
            seen.append(counters["stats"]["unique_graphs"])
        return seen

    mine = graphs(case.cls)
    assert mine[-1] == mine[2] <= 3
    if case.cls is ours.SGD:
        stock = graphs(torch.optim.SGD)
        assert stock[-1] == 6


@pytest.mark.parametrize("options", [{}, dict(foreach=True), dict(fused=True)], ids=str)
@each_compiled(everyday=())
def test_every_path_compiles(case: Case, options: dict[str, Any]) -> None:
    if not all(case.takes(option) for option in options):
        return
    seen, expected, frames = compiled_and_eager(case.cls, case.configs[1], CompileCounter(), **options)
    near(seen, expected)
    assert frames[-1] == frames[2] <= 3


@each_compiled(everyday=(ours.AdamW,))
def test_lists_are_one_graph(case: Case) -> None:
    """Dynamo does not trace a Tensor, which lr is there, over a TensorList, which the step counts are."""
    params = parameters(shapes=((3,), ()))
    optimizer = build(case.cls, params, case.configs[0], foreach=True)
    backend = CompileCounter()
    step = torch.compile(optimizer.step, backend=backend)
    for i, grads in enumerate(gradients(params, 5, missing=False)):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.9**i
        set_gradients(params, grads)
        step()
    assert not counters["graph_break"]
    assert backend.frame_count <= 3  # a first step, another step, an lr that changes


@each_compiled(everyday=())
def test_aot(case: Case) -> None:
    seen, expected, _ = compiled_and_eager(case.cls, case.configs[1], "aot_eager")
    near(seen, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Live scalars are 0-dimensional float64: they must not promote 0-dimensional weights."""
    seen, expected, _ = compiled_and_eager(ours.AdamW, dict(lr=0.01, weight_decay=0.1), "eager", dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(seen, expected, rtol=8 * eps, atol=eps)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.cls in (ours.SGD, ours.AdamW, ours.Lion)], ids=lambda c: c.name)
def test_inductor(case: Case) -> None:
    seen, expected, _ = compiled_and_eager(case.cls, case.configs[1], "inductor")
    near(seen, expected)


# Dynamo, resuming after the graph break of every optimizer's step, looks at the .grad of the loss.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@each_compiled()
def test_a_compiled_training_step(case: Case, backend: str) -> None:
    """Forward, backward and step in one function, as users compile it; with and without zero_grad to None."""

    def trained(wrap: Callable[[Any], Any]) -> Any:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = build(case.cls, model.parameters(), dict(lr=0.01))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

        def train(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        function, losses = wrap(train), []
        for step in range(5):
            losses.append(float(function(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)))))
            schedule.step()
        return losses, [p.detach() for p in model.parameters()]

    torch.testing.assert_close(
        trained(lambda f: torch.compile(f, backend=backend)), trained(lambda f: f), rtol=2e-5, atol=2e-6
    )
    assert not any("recompile_limit" in str(key) for key in counters["frames"])


@each_compiled()
def test_parameters_with_and_without_gradients_do_not_recompile_for_ever(case: Case) -> None:
    params = parameters()
    optimizer = build(case.cls, params, case.configs[0])
    backend = CompileCounter()
    step = torch.compile(optimizer.step, backend=backend)
    grads = gradients(params, 12, missing=False)
    for i, gs in enumerate(grads):
        set_gradients(params, [None if (i % 2 and j == 0) else g for j, g in enumerate(gs)])
        step()
        if i == 5:
            compiled = backend.frame_count
    assert backend.frame_count == compiled


def test_state_made_by_a_compiled_step_is_saved_and_goes_on_eagerly() -> None:
    params, clean = parameters(), parameters()
    grads = gradients(params, 6, missing=False)
    optimizer = ours.AdamW(params, foreach=False)
    step = torch.compile(optimizer.step, backend="eager")
    for gs in grads[:3]:
        set_gradients(params, gs)
        step()
    run(ours.AdamW(clean, foreach=False), [])
    other = ours.AdamW([nn.Parameter(p.detach().clone()) for p in params], foreach=False)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, grads[3:])
    run(other, grads[3:])
    torch.testing.assert_close(
        [p.detach() for p in params], [p.detach() for p in other.param_groups[0]["params"]], rtol=0, atol=0
    )
