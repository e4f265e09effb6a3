"""Steps by kernels for GPUs, against the rule itself and torch: on a GPU (`make test-cuda`), or in Triton's interpreter, where
test_cuda.py runs them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchcalc.optim as ours
from tests.interpreter import mend
from tests.optim.cases import CASES, Case
from torchcalc.native import gpu
from torchcalc.optim import cuda

if gpu.INTERPRETED:
    mend()
DEVICE = "cpu" if gpu.INTERPRETED else "cuda"

SHAPES = ((33, 70), (5,), (2100,), (), (2, 3, 4, 4))


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The batches that kernels have stepped, and in the end at least one."""
    seen: list[Any] = []
    launch = cuda.launch
    monkeypatch.setattr(
        cuda, "launch", lambda way, arguments, batch, *rest: (seen.append(batch), launch(way, arguments, batch, *rest))
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield seen
    assert seen


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple[Any, ...] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def give(ps: list[nn.Parameter], *others: list[nn.Parameter], scale: float = 1.0) -> None:
    for i, p in enumerate(ps):
        p.grad = (scale * torch.randn(p.shape, dtype=torch.float64)).to(p.dtype)
        for qs in others:
            qs[i].grad = p.grad.to(qs[i].dtype, copy=True)


def check_equal(ps: list[nn.Parameter], qs: list[nn.Parameter], ulps: float = 8) -> None:
    """ulps: of a number as large as a tensor's largest. Rules add up numbers of the parameters' size."""
    for p, q in zip(ps, qs, strict=True):
        allowed = ulps * torch.finfo(p.dtype).eps * max(1.0, q.detach().abs().max().item())
        assert (p - q).abs().max().item() <= allowed


ROWS = [
    pytest.param(case, config, dtype, id=f"{case.name}-{i}-{dtype}")
    for case in CASES
    for i, config in enumerate(case.configs)
    for dtype in ((torch.float32,) if i else (torch.float32, torch.float64))
]


@pytest.mark.parametrize(("case", "config", "dtype"), ROWS)
def test_the_rule(case: Case, config: dict[str, Any], dtype: torch.dtype, launches: list[Any]) -> None:
    ps = parameters(dtype)
    qs = twins(ps)
    mine, rule = case.cls(ps, **copy.deepcopy(config)), case.cls(qs, **copy.deepcopy(config), foreach=False)
    for _ in range(3):
        give(ps, qs)
        before = [p.grad.clone() for p in ps]
        versions = [p._version for p in ps]
        mine.step()
        rule.step()
        assert all(map(torch.equal, before, [p.grad for p in ps]))
        assert all(p._version > version for p, version in zip(ps, versions, strict=True))
    check_equal(ps, qs, 64 if case.name == "RMSprop" else 8)  # whose centered variance cancels
    for p, q in zip(ps, qs, strict=True):
        assert mine.state[p].keys() == rule.state[q].keys()
        for key, slot in rule.state[q].items():
            assert mine.state[p][key].dtype == slot.dtype and mine.state[p][key].device == slot.device
            torch.testing.assert_close(mine.state[p][key], slot)


@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_a_rule_that_keeps_other_numbers_beside_its_steps(name: str, launches: list[Any]) -> None:
    """By a kernel while they are the same for all tensors; the rule where a gradient was missing, and from then on."""
    ps = parameters()
    qs = twins(ps)
    cls = getattr(ours, name)
    mine, rule = cls(ps, lr=0.01), cls(qs, lr=0.01, foreach=False)
    by_kernel = []
    for i in range(7):
        give(ps, qs)
        if i == 4:
            ps[0].grad = qs[0].grad = None
        before = len(launches)
        mine.step()
        rule.step()
        by_kernel.append(len(launches) > before)
    assert by_kernel == [False, True, True, True, False, False, False]  # the first step makes the state
    check_equal(ps, qs)
    for p, q in zip(ps, qs, strict=True):
        for key in mine.scalars:
            torch.testing.assert_close(mine.state[p][key], rule.state[q][key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_half_types_are_computed_in_float32_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    ps = parameters(dtype)
    cls = getattr(ours, name)
    options = dict(momentum=0.9) if name == "SGD" else {}
    mine = cls(ps, lr=0.01, **options)
    for _ in range(3):
        qs = [nn.Parameter(p.detach().float()) for p in ps]
        rule = cls(qs, lr=0.01, foreach=False, **options)
        for p, q in zip(ps, qs, strict=True):
            rule.state[q] = {k: x.clone() if k == "step" else x.float() for k, x in mine.state[p].items()}
        give(ps, qs)
        mine.step()
        rule.step()
        for p, q in zip(ps, qs, strict=True):
            torch.testing.assert_close(p, q.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{}, dict(fused=True), dict(capturable=True), dict(fused=True, amsgrad=True)], ids=str
)
def test_torch(options: dict[str, Any]) -> None:
    """Also loaded both ways in mid-training."""
    ps = parameters()
    qs = twins(ps)
    mine = ours.AdamW(ps, lr=0.01, **options)
    stock = torch.optim.AdamW(qs, lr=0.01, amsgrad=options.get("amsgrad", False), foreach=False)
    for i in range(6):
        give(ps, qs)
        mine.step()
        stock.step()
        if i == 2:
            saved = copy.deepcopy(mine.state_dict())
            stock.load_state_dict({**saved, "param_groups": stock.state_dict()["param_groups"]})
            mine.load_state_dict({**copy.deepcopy(stock.state_dict()), "param_groups": saved["param_groups"]})
        if i == 3:
            mine = copy.deepcopy(mine)
            ps = [p for group in mine.param_groups for p in group["params"]]
    check_equal(ps, qs)
    assert all(mine.state[p]["step"] == 6 for p in ps)


def test_pickle() -> None:
    mine = ours.Adam(parameters(), skip_nonfinite=True)
    give(mine.param_groups[0]["params"])
    mine.step()
    mine.step()
    again = pickle.loads(pickle.dumps(mine))
    assert [s["step"].item() for s in again.state.values()] == [2.0] * len(SHAPES)
    assert again.skipped_steps == 0


@pytest.mark.parametrize("options", [{}, dict(fused=True)], ids=str)
def test_gradients_that_come_and_go(options: dict[str, Any]) -> None:
    """Step counts then differ between the tensors of one launch."""
    ps = parameters()
    qs = twins(ps)
    mine, stock = ours.Adam(ps, lr=0.1, **options), torch.optim.Adam(qs, lr=0.1, foreach=False)
    for present in ((0, 1), (1, 2, 3), (0, 1, 2, 3, 4), (4,), (0, 1, 2, 3, 4)):
        give(ps, qs)
        for i in set(range(len(ps))) - set(present):
            ps[i].grad = qs[i].grad = None
        mine.step()
        stock.step()
    check_equal(ps, qs)
    assert [mine.state[p]["step"] for p in ps] == [stock.state[q]["step"] for q in qs]


def test_tensors_that_move() -> None:
    ps = parameters()
    qs = twins(ps)
    mine, stock = ours.Adam(ps, lr=0.1), torch.optim.Adam(qs, lr=0.1, foreach=False)

    def step() -> None:
        give(ps, qs)
        mine.step()
        stock.step()
        check_equal(ps, qs)

    step()
    ps[0].data = ps[0].data.clone()
    step()
    mine.state[ps[1]]["exp_avg"] = mine.state[ps[1]]["exp_avg"].clone()
    step()
    mine.state[ps[2]]["exp_avg"].data = mine.state[ps[2]]["exp_avg"].data.clone()
    step()
    mine.state[ps[2]]["step"].fill_(1)
    stock.state[qs[2]]["step"].fill_(1)
    step()
    mine.state[ps[3]] = copy.deepcopy(mine.state[ps[3]])
    step()
    mine.param_groups[0]["lr"] = stock.param_groups[0]["lr"] = 0.01
    step()
    mine.param_groups[0]["weight_decay"] = stock.param_groups[0]["weight_decay"] = 0.1
    step()
    extra = [nn.Parameter(torch.ones(3))]
    mine.add_param_group({"params": extra})
    stock.add_param_group({"params": twins(extra)})
    ps += extra
    qs += stock.param_groups[1]["params"]
    step()


def test_layouts(launches: list[Any]) -> None:
    """Dense tensors as they lie; where strides differ, and where there is a column only, the rule."""
    ps = parameters(shapes=((2, 3, 4, 4), (2, 3, 4, 4), (6, 4), (7,)))
    ps[0].data = ps[0].data.to(memory_format=torch.channels_last)
    ps[2].data = torch.randn(4, 6).t()
    ps[3].data = torch.randn(7, 2)[:, 0]
    qs = twins(ps)
    mine, stock = ours.AdamW(ps), torch.optim.AdamW(qs, foreach=False)
    for _ in range(3):
        give(ps, qs)
        ps[0].grad = ps[0].grad.to(memory_format=torch.channels_last)
        ps[2].grad = ps[2].grad.t().contiguous().t()
        mine.step()
        stock.step()
        check_equal(ps, qs)
    assert {len(batch.params) for batch in launches} == {3}
    ps[0].grad, qs[0].grad = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    mine.step()
    stock.step()
    check_equal(ps, qs)
    assert len(launches[-1].params) == 2


def test_what_the_rule_does() -> None:
    """Beside tensors that kernels take: complex ones, sparse gradients, an empty tensor."""
    ps = [
        nn.Parameter(torch.randn(4)),
        nn.Parameter(torch.randn(4, dtype=torch.complex64)),
        nn.Parameter(torch.ones(0)),
    ]
    ps.append(nn.Parameter(torch.randn(3, 2)))
    qs = twins(ps)
    mine, stock = ours.SGD(ps, momentum=0.5), torch.optim.SGD(qs, momentum=0.5, foreach=False)
    for _ in range(3):
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn_like(p)
            if p.dim() == 2:
                p.grad = torch.sparse_coo_tensor([[1]], torch.randn(1, 2), (3, 2), check_invariants=True)
            q.grad = p.grad.clone()
        mine.step()
        stock.step()
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)


def test_addresses_that_are_not_aligned(launches: list[Any]) -> None:
    ps = parameters(shapes=((2100,), (10,)))
    qs = twins(ps)
    mine, stock = ours.AdamW(ps), torch.optim.AdamW(qs, foreach=False)
    for i in range(3):
        give(ps, qs)
        if i != 1:
            ps[0].grad = torch.cat([torch.zeros(1), ps[0].grad])[1:]
        mine.step()
        stock.step()
        check_equal(ps, qs)
    assert {batch.aligned for batch in launches} == {True, False}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping(name: str, max_norm: float, dtype: torch.dtype) -> None:
    ps = parameters(dtype)
    qs = [nn.Parameter(p.detach().float()) for p in ps]
    mine = getattr(ours, name)([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.01}], lr=0.1, max_norm=max_norm)
    stock = getattr(torch.optim, name)([{"params": qs[:2]}, {"params": qs[2:], "lr": 0.01}], lr=0.1, foreach=False)
    for _ in range(1 if dtype == torch.bfloat16 else 3):
        give(ps, qs)
        norm = nn.utils.clip_grad_norm_(qs, max_norm)
        mine.step()
        stock.step()
        assert isinstance(mine.grad_norm, Tensor)
        torch.testing.assert_close(mine.grad_norm.float(), norm)
    check_equal(ps, [nn.Parameter(q.to(dtype)) for q in qs])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_skipping(bad: float) -> None:
    ps = parameters()
    mine = ours.SGD(ps, momentum=0.9, dampening=0.5, skip_nonfinite=True)
    qs = twins(ps)
    stock = torch.optim.SGD(qs, momentum=0.9, dampening=0.5, foreach=False)
    for i in range(6):
        give(ps, qs)
        if i % 2:
            stock.step()
        else:
            ps[2].grad[-1] = bad
        mine.step()
        check_equal(ps, qs)
    assert mine.skipped_steps == 3
    mine.load_state_dict(mine.state_dict())
    assert mine.skipped_steps == 3


def test_steps_of_skipped_steps_are_not_counted() -> None:
    ps = parameters()
    mine = ours.Adam(ps, skip_nonfinite=True)
    for bad in (False, False, True, False):
        give(ps)
        if bad:
            ps[0].grad[0] = math.nan
        mine.step()
    assert [mine.state[p]["step"].item() for p in ps] == [3.0] * len(ps)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_scaled_gradients(max_norm: float | None) -> None:
    """GradScaler lends the optimizer its scale and found_inf."""
    ps = parameters()
    qs = twins(ps)
    mine = ours.AdamW(ps, fused=True, max_norm=max_norm)
    stock = torch.optim.AdamW(qs, foreach=False)
    for found in (0.0, 0.0, 1.0, 0.0):
        give(ps, qs)
        for p in ps:
            p.grad *= 1024
        mine.grad_scale, mine.found_inf = torch.tensor(1024.0), torch.tensor(found)
        mine.step()
        if not found:
            if max_norm:
                norm = nn.utils.clip_grad_norm_(qs, max_norm)
                torch.testing.assert_close(torch.as_tensor(mine.grad_norm).float(), norm)
            stock.step()
        check_equal(ps, qs)
    assert all(mine.state[p]["step"] == 3 for p in ps)


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ps = parameters()
    lr, betas = torch.tensor(0.01), (torch.tensor(0.9), torch.tensor(0.99))
    mine = ours.AdamW(ps, lr=lr, betas=betas, fused=True, max_norm=1.0, skip_nonfinite=True)
    qs = twins(ps)
    stock = torch.optim.AdamW(qs, lr=0.01, betas=(0.9, 0.99), foreach=False)
    scale, found = torch.tensor(8.0), torch.tensor(0.0)
    for i in range(4):
        give(ps, qs)
        for p in ps:
            p.grad *= 8
        mine.grad_scale, mine.found_inf = scale, found
        with monkeypatch.context() as patch:
            if i > 1:  # state and plans are made
                for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
                    patch.setattr(Tensor, name, lambda self, *_, name=name: pytest.fail(f"{name} waits"))
            mine.step()
        nn.utils.clip_grad_norm_(qs, 1.0)
        stock.step()
        check_equal(ps, qs)


def test_capturing_a_graph(monkeypatch: pytest.MonkeyPatch, launches: list[Any]) -> None:
    """Addresses go to the device as arguments of a kernel, and what the graph reads stays there."""
    ps = parameters(shapes=SHAPES + ((3,),) * 30)
    qs = twins(ps)
    mine, stock = ours.AdamW(ps, capturable=True, max_norm=1.0), torch.optim.AdamW(qs, foreach=False)
    for i in range(5):
        give(ps, qs)
        nn.utils.clip_grad_norm_(qs, 1.0)
        with monkeypatch.context() as patch:
            if i == 3:
                patch.setattr(gpu, "capturing", lambda *_: True)
            mine.step()
        stock.step()
        check_equal(ps, qs)
        if i == 3:
            kept = mine._memory.captured
            assert any(x is launches[-1] for x in kept) and any(x is launches[-1].grads for x in kept)
    mine.load_state_dict(mine.state_dict())
    assert all(any(x is y for y in mine._memory.captured) for x in kept)


@pytest.mark.parametrize(
    ("dtype", "value", "distance"),
    [
        (torch.bfloat16, 1.0, -(2.0**-8)),
        (torch.bfloat16, -3.0, 2.0**-6),
        (torch.float16, 1.5, 2.0**-10),
        (torch.float16, -1.0, 2.0**-11),
        (torch.float16, 2.0**-18, 2.0**-24),  # subnormal
        (torch.float16, 0.0, -(2.0**-24)),
        (torch.float16, -0.0, 2.0**-24),
    ],
)
def test_stochastic_rounding(dtype: torch.dtype, value: float, distance: float) -> None:
    """From a value 0.3 of the distance to its neighbour on."""
    n = 4096
    p, again = (nn.Parameter(torch.full((n,), value, dtype=dtype)) for _ in range(2))
    for x in (p, again):
        x.grad = torch.full((n,), -math.copysign(1.0, distance), dtype=dtype)
        torch.manual_seed(1)
        ours.SGD([x], lr=0.3 * abs(distance), rounding="stochastic").step()
    moved = p.double() == value + distance
    assert torch.all(moved | (p.double() == value))
    assert abs(moved.double().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    assert torch.equal(p, again)


def test_stochastic_rounding_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step, for each tensor, and at each replay of a graph."""
    ps = [nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(3)]
    mine = ours.AdamW([{"params": ps[:2]}, {"params": ps[2:]}], lr=1e-3, capturable=True, rounding="stochastic")
    seen = []
    for i in range(4):
        for p in ps:
            p.data.fill_(1)
            p.grad = torch.ones_like(p)
        with monkeypatch.context() as patch:
            if i >= 2:
                patch.setattr(gpu, "capturing", lambda *_: True)
                patch.setattr(cuda, "draw_seed", lambda: 7)  # as a graph holds it
            mine.step()
        seen += [p.detach().clone() for p in ps]
    for i, a in enumerate(seen):
        assert 0 < (a != 1).sum() < 512
        assert not any(torch.equal(a, b) for b in seen[:i])


def test_what_is_not_finite_in_stochastic_rounding() -> None:
    p = nn.Parameter(torch.tensor([math.inf, -math.inf, math.nan, 3.38e38, -3.38e38], dtype=torch.bfloat16))
    q = nn.Parameter(p.detach().clone())
    for x, rounding in ((p, "stochastic"), (q, "nearest")):
        x.grad = torch.tensor([1, 1, 1, -1e36, 1e36], dtype=torch.bfloat16)
        ours.SGD([x], lr=0.1, rounding=rounding).step()
    assert torch.equal(p[:2], q[:2]) and p[2].isnan() and p[3:].isfinite().all()


def test_options_that_choose_another_way(launches: list[Any]) -> None:
    ps = parameters()
    for options in (dict(foreach=False), dict(foreach=True), dict(fused=False), dict(differentiable=True)):
        give(ps)
        if options.get("differentiable"):
            continue
        ours.AdamW(ps, **options).step()
    assert not launches
    ours.AdamW(ps).step()


on_a_gpu = pytest.mark.skipif(gpu.INTERPRETED, reason="Triton's interpreter has no streams and graphs")


@on_a_gpu
@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_a_graph(name: str) -> None:
    ps = parameters()
    qs = twins(ps)
    mine = getattr(ours, name)(ps, lr=0.01, capturable=True, **(dict(max_norm=1.0) if name == "AdamW" else {}))
    stock = getattr(torch.optim, name)(qs, lr=0.01, foreach=False)
    give(ps)

    def stock_step() -> None:
        for p, q in zip(ps, qs, strict=True):
            q.grad = p.grad.clone()
        if name == "AdamW":
            nn.utils.clip_grad_norm_(qs, 1.0)
        stock.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            mine.step()
            stock_step()
    torch.cuda.current_stream().wait_stream(side)
    for p in ps:
        p.grad = p.grad.clone()  # elsewhere than in the steps before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for _ in range(3):
        for p in ps:
            p.grad.normal_()
        graph.replay()
        stock_step()
        check_equal(ps, qs)
    mine.step()
    stock_step()
    check_equal(ps, qs)
    assert all(mine.state[p]["step"] == 7 for p in ps)


@on_a_gpu
def test_a_graph_of_one_steps_numbers_is_refused() -> None:
    ps = parameters()
    mine = ours.Adam(ps)
    give(ps)
    mine.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        mine.step()


@on_a_gpu
def test_no_synchronisation() -> None:
    ps = parameters()
    mine = ours.AdamW(ps, fused=True, max_norm=1.0, skip_nonfinite=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for i in range(5):
        give(ps, scale=8.0)
        scaler.scale(torch.ones(()))
        if i > 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.step(mine)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()
    assert mine.skipped_steps == 0
    assert all(mine.state[p]["step"] == 5 for p in ps)


@on_a_gpu
def test_streams() -> None:
    """A step on another stream than the last one's."""
    ps = parameters()
    qs = twins(ps)
    mine, stock = ours.AdamW(ps), torch.optim.AdamW(qs, foreach=False)
    for i in range(6):
        give(ps, qs)
        stream = torch.cuda.Stream() if i % 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            mine.step()
        torch.cuda.current_stream().wait_stream(stream)
        stock.step()
        check_equal(ps, qs)
