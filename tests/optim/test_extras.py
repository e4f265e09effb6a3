"""Clipping, skipping and stochastic rounding inside the step: equal to the separate calls, with kernels and without."""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import torchcalc.optim as ours
from torchcalc import native
from torchcalc.native import load
from torchcalc.optim.extras import clip_coefficient, global_norm, round_stochastically_

CLASSES = {
    "SGD": (ours.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (ours.Adam, torch.optim.Adam, {"amsgrad": True}),
    "AdamW": (ours.AdamW, torch.optim.AdamW, {}),
}
#: They serve every optimizer; GradientDescent looks at its own step. Lion's twin is Lion, with torch's clipping.
EVERY: dict[str, Any] = {
    **CLASSES,
    "RMSprop": (ours.RMSprop, torch.optim.RMSprop, {"centered": True, "momentum": 0.9, "eps": 1e-3}),
    "Adagrad": (ours.Adagrad, torch.optim.Adagrad, {}),
    "NAdam": (ours.NAdam, torch.optim.NAdam, {}),
    "Lion": (ours.Lion, ours.Lion, {"lr": 0.01}),
}
WAYS = {"default": {}, "loop": {"foreach": False}, "foreach": {"foreach": True}}


def params(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 5), (7,), (), (0, 3))]


class Opaque(Tensor):
    """A subclass that knows torch's own operations, and no kernel of anybody else's."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Opaque:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace != "aten":
            raise NotImplementedError(f"no {op}")
        return op(*tree_map_only(Opaque, lambda t: t.inner, args), **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6, math.inf])
def test_max_norm_equals_clip_grad_norm(name: str, way: str, dtype: torch.dtype, max_norm: float) -> None:
    cls, twin, options = EVERY[name]
    a = params(dtype)
    b = copy.deepcopy(a)
    mine = cls(a, max_norm=max_norm, **options, **WAYS[way])
    stock = twin(b, foreach=False, **options)
    for _ in range(5):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [p.grad.clone() for p in a]
        norm = torch.nn.utils.clip_grad_norm_(b, max_norm)
        stock.step()
        mine.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(a, before, strict=True)), "p.grad was written"
        assert float(mine.grad_norm) == pytest.approx(norm.item(), rel=1e-6)
    for p, q in zip(a, b, strict=True):
        # The coefficient is rounded to the dtype by torch and not by us: one ulp of the gradient a step.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_skip_nonfinite_touches_nothing_and_counts(name: str, way: str, bad: float) -> None:
    cls, _, options = EVERY[name]
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = cls([{"params": [p]}, {"params": [q]}], skip_nonfinite=True, **options, **WAYS[way])

    def step(last: float) -> None:
        p.grad, q.grad = torch.ones(3), torch.tensor([1.0, last])
        optimizer.step()

    step(bad)  # the first step: there is no state yet, and there must be none after
    assert optimizer.skipped_steps == 1
    assert name == "Adagrad" or not any(optimizer.state.values())
    assert p.tolist() == [1.0, 1.0, 1.0]
    step(1.0)
    saved = copy.deepcopy(optimizer.state_dict()), p.clone(), q.clone()
    step(bad)
    assert optimizer.skipped_steps == 2
    assert torch.equal(p, saved[1])
    assert torch.equal(q, saved[2])
    for key, state in optimizer.state_dict()["state"].items():
        for name_, value in state.items():
            assert torch.equal(value, saved[0]["state"][key][name_])
    step(1.0)
    assert optimizer.skipped_steps == 2
    assert not torch.equal(p, saved[1])


def test_without_skip_nonfinite_a_nan_goes_through_as_with_torch() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = ours.SGD([p], lr=0.1, max_norm=1.0)
    p.grad = torch.tensor([math.nan, 1.0])
    optimizer.step()
    q = nn.Parameter(torch.ones(2))
    q.grad = torch.tensor([math.nan, 1.0])
    torch.nn.utils.clip_grad_norm_([q], 1.0)
    torch.optim.SGD([q], lr=0.1).step()
    assert torch.equal(p.isnan(), q.isnan())


@pytest.mark.parametrize("way", ["default", "loop"])
@pytest.mark.parametrize("name", EVERY)
def test_clipping_comes_after_unscaling(name: str, way: str) -> None:
    cls, _, options = EVERY[name]
    a = params()
    b = copy.deepcopy(a)
    fused = {"fused": True} if way == "default" and name not in ("RMSprop", "NAdam") else {}
    scaled = cls(a, max_norm=0.5, **fused, **options, **WAYS[way])
    plain = cls(b, max_norm=0.5, **options, **WAYS[way])
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)  # as GradScaler.step lends them
    for _ in range(3):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * 1024
        scaled.step()
        plain.step()
    assert float(scaled.grad_norm) == pytest.approx(float(plain.grad_norm), rel=1e-6)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_norm_is_over_all_groups_and_not_each() -> None:
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = ours.SGD([{"params": [p]}, {"params": [q], "lr": 2.0}], lr=1.0, max_norm=1.0)
    p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(5.0)
    assert p.item() == pytest.approx(-3 / 5, rel=1e-5)
    assert q.item() == pytest.approx(-2 * 4 / 5, rel=1e-5)


def test_the_norm_of_large_finite_gradients_is_finite() -> None:
    norm = global_norm([torch.full((4,), 1e30), torch.full((4,), -1e30, dtype=torch.bfloat16)])
    assert norm.finite
    assert norm.value == pytest.approx(math.sqrt(8) * 1e30, rel=1e-2)
    assert not global_norm([torch.tensor([1.0, math.inf])]).finite
    sparse = torch.sparse_coo_tensor([[0, 0]], [3.0, 1.0], (5,), check_invariants=True)
    assert global_norm([sparse, torch.tensor([3.0])]).value == pytest.approx(5.0)
    assert global_norm([torch.tensor([3 + 4j])]).value == pytest.approx(5.0)
    assert global_norm([torch.tensor([3 + 4j]).conj()]).value == pytest.approx(5.0)
    assert global_norm([]).value == 0
    assert global_norm([Opaque(torch.tensor([3.0])), torch.tensor([4.0])]).value == pytest.approx(5.0)


def test_clip_coefficient_is_torchs_formula() -> None:
    for norm in (0.0, 0.5, 1.0, 7.0, math.inf):
        for max_norm in (0.0, 0.5, 2.0):
            expected = min(1.0, max_norm / (norm + 1e-6))
            assert clip_coefficient(norm, max_norm) == expected
            assert clip_coefficient(torch.tensor(norm), max_norm).item() == pytest.approx(expected, rel=1e-6)
    assert math.isnan(clip_coefficient(math.nan, 1.0))  # as torch: a nan is not hidden


# Stochastic rounding.


@pytest.mark.parametrize("way", ["default", "loop", "foreach"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_moves_weights_on_average(name: str, way: str, dtype: torch.dtype) -> None:
    cls, n = CLASSES[name][0], 4096
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, **WAYS[way]}

    def after_100_steps(dtype: torch.dtype, **more: Any) -> Tensor:
        p = nn.Parameter(torch.ones(n, dtype=dtype))
        optimizer = cls([p], **options, **more)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().double()

    exact = after_100_steps(torch.float64).mean().item()
    assert exact == pytest.approx(0.9, abs=1e-6)
    if dtype == torch.bfloat16:
        assert after_100_steps(dtype).mean().item() == 1.0, "nearest stalls, as in torch"
    rounded = after_100_steps(dtype, rounding="stochastic")
    # 100 roundings, each of standard deviation <= half the neighbours' distance below 1; the mean of n has 1/√n of it.
    # Adam's state is rounded to nearest, which moves its step by up to 2 roundings.
    deviation = math.sqrt(100) * torch.finfo(dtype).eps / 4 / math.sqrt(n)
    assert abs(rounded.mean().item() - exact) < 5 * deviation + 0.1 * 2 * torch.finfo(dtype).eps
    assert rounded.std().item() > 0


@pytest.mark.parametrize("name", [name for name in EVERY if name not in CLASSES])
def test_stochastic_rounding_serves_every_optimizer(name: str) -> None:
    """Its mean goes where float64 goes; state in bfloat16 moves an average by a few of its roundings of 2⁻⁸."""
    ends = {}
    for dtype in (torch.float64, torch.bfloat16):
        p = nn.Parameter(torch.ones(4096, dtype=dtype))
        optimizer = EVERY[name][0]([p], lr=1e-3, rounding="stochastic")
        for _ in range(20):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[dtype] = p.detach().double()
    assert ends[torch.bfloat16].std() > 0
    moved, exact = 1 - ends[torch.bfloat16].mean().item(), 1 - ends[torch.float64].mean().item()
    deviation = math.sqrt(20) * torch.finfo(torch.bfloat16).eps / 4 / math.sqrt(4096)
    assert abs(moved - exact) < 5 * deviation + 4 * 2**-8 * exact


def test_every_optimizer_takes_them_and_explains_them() -> None:
    """But GradientDescent, which compares the loss before and after its own step."""
    for name in ours.__all__:
        cls = getattr(ours, name)
        if cls is ours.Optimizer or not issubclass(cls, ours.Optimizer):
            continue
        explained = re.findall(r"^    (\w+): ", inspect.getdoc(cls) or "", re.MULTILINE)
        arguments = list(inspect.signature(cls).parameters)
        assert explained[: len(arguments)] == arguments
        assert cls is ours.GradientDescent or {"max_norm", "skip_nonfinite", "rounding"} <= set(arguments)


def test_repr_tells_what_is_not_the_default() -> None:
    p = nn.Parameter(torch.ones(1))
    told = repr(ours.Lion([p], max_norm=0.5, rounding="stochastic"))
    assert told.endswith("    weight_decay: 0\nAll Groups\n    max_norm: 0.5\n    rounding: stochastic\n)")
    assert "skip_nonfinite: True" in repr(ours.AdamW([p], skip_nonfinite=True))
    assert repr(ours.GradientDescent([p], backtrack=True)).endswith("All Groups\n    backtrack: True\n)")
    assert "All Groups" not in repr(ours.GradientDescent([p]))


@pytest.mark.parametrize("way", ["default", "loop"])
def test_stochastic_rounding_is_reproducible(way: str) -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        p = nn.Parameter(torch.linspace(-2, 2, 1000, dtype=torch.bfloat16))
        optimizer = ours.AdamW([p], lr=1e-3, rounding="stochastic", **WAYS[way])
        for _ in range(5):
            p.grad = torch.full_like(p, 0.3)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_every_group_has_random_numbers_of_its_own() -> None:
    ps = [nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = ours.AdamW([{"params": [p]} for p in ps], rounding="stochastic")
    for _ in range(5):
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert not torch.equal(*ps)


def test_float32_is_not_rounded() -> None:
    a, b = params(), None
    b = copy.deepcopy(a)
    for p, q in zip(a, b, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    ours.AdamW(a, rounding="stochastic").step()
    ours.AdamW(b).step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_goes_to_a_neighbour_with_the_right_probability(dtype: torch.dtype) -> None:
    """Over exponents, signs, subnormals and zero; exact values stay."""
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal
    low = torch.tensor([1.0, -1.0, 1.0 - eps / 2, 3.0, -300.0, tiny, -tiny / 4, 0.0]).to(dtype)
    up = (low.view(torch.int16) + 1).view(dtype)  # the neighbour farther from zero
    for fraction in (0.0, 0.25, 0.5, 0.9):
        x = low.float() + fraction * (up.float() - low.float())
        n = 20_000
        p = torch.empty(n, len(x), dtype=dtype)
        round_stochastically_(p, x.expand(n, -1).contiguous())
        assert ((p == low) | (p == up)).all()
        share = (p == up).double().mean(0)
        assert (share - fraction).abs().max() < 5 * math.sqrt(0.25 / n) + 1e-9
        if fraction == 0.0:
            assert (p == low).all()
    p = torch.empty(3, dtype=dtype)
    round_stochastically_(p, torch.tensor([math.inf, -math.inf, math.nan]))
    assert p[:2].tolist() == [math.inf, -math.inf]
    assert p[2].isnan()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_norm": -1.0}, "Invalid max_norm: -1.0"),
        ({"max_norm": math.nan}, "Invalid max_norm: nan"),
        ({"rounding": "up"}, "Invalid rounding: 'up'"),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_bad_options_are_refused(name: str, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EVERY[name][0]([nn.Parameter(torch.ones(1))], **option)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"skip_nonfinite": True}, {"rounding": "stochastic"}], ids=str)
def test_a_group_has_no_extras_of_its_own(option: dict[str, Any]) -> None:
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.*pass it to the optimizer"):
        ours.AdamW([{"params": [p], **option}])
    optimizer = ours.AdamW([p])
    with pytest.raises(ValueError, match="pass it to the optimizer"):
        optimizer.add_param_group({"params": [q], **option})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", EVERY)
def test_options_survive_deepcopy_and_stay_out_of_state_dict(name: str) -> None:
    cls, twin, options = EVERY[name]
    p = nn.Parameter(torch.ones(2))
    optimizer = cls([p], max_norm=1.0, skip_nonfinite=True, rounding="stochastic", **options)
    again = copy.deepcopy(optimizer)
    assert (again.max_norm, again.skip_nonfinite, again.rounding) == (1.0, True, "stochastic")
    assert set(optimizer.param_groups[0]) == set(twin([p], **options).param_groups[0])


def sharded(rank: int, folder: str) -> None:
    """Two ranks hold halves of the weights; the clipped and skipped steps equal those of the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weights, grads = [torch.randn(5, 3), torch.randn(4)], [torch.randn(5, 3), torch.randn(4)]
    whole = [nn.Parameter(w.clone()) for w in weights]
    halves = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in weights]
    options: dict[str, Any] = {"lr": 0.1, "max_norm": 0.5, "skip_nonfinite": True}
    a, b = ours.AdamW(whole, **options), ours.AdamW(halves, **options)
    for step in range(4):
        for p, q, g in zip(whole, halves, grads, strict=True):
            p.grad = g.clone()
            if step == 2:
                p.grad.view(-1)[0] = math.inf  # on rank 0 only; both must skip
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        a.step()
        b.step()
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-6)  # float32 partial sums, without kernels
    assert a.skipped_steps == b.skipped_steps == 1
    for p, q in zip(whole, halves, strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-6, atol=1e-7)
    dist.destroy_process_group()


def test_shards_clip_and_skip_as_the_whole(tmp_path: Path) -> None:
    os.environ.pop("RANK", None)
    torch.multiprocessing.spawn(sharded, args=(str(tmp_path),), nprocs=2)


def sharded_twice(rank: int, folder: str) -> None:
    """Data and tensor parallel at once: torch shards one dimension over both, and calls that neither shard nor partial."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(net, mesh=mesh["data"])
    optimizer = ours.AdamW(net.parameters(), max_norm=1.0, skip_nonfinite=True)
    for step in range(2):
        optimizer.zero_grad()
        net(torch.randn(4, 8)).square().sum().backward()
        if step == 1 and rank == 0:
            next(net.parameters()).grad.to_local().fill_(math.nan)
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).full_tensor().item()
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(norm, rel=1e-5, nan_ok=True)
        assert optimizer.skipped_steps == step
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_over_two_dimensions_clip_and_skip_as_the_whole(tmp_path: Path) -> None:
    os.environ.pop("RANK", None)
    torch.multiprocessing.spawn(sharded_twice, args=(str(tmp_path),), nprocs=4)


# The plan of the native step.


class TestPlan:
    """A plan remembers; each of these changes must make it forget."""

    @pytest.fixture(autouse=True, params=["kernels", "torch's operations"])
    def way(self, request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
        if request.param == "kernels" and not native.available():
            pytest.skip(native.why_not())
        if request.param != "kernels":
            monkeypatch.setattr(load, "_loaded", load._Loaded(None, "none in this test", None, "", intended=True))
        return str(request.param)

    def leaves(self, mine: Any, rests: list[list[int]]) -> None:
        """What each plan leaves to the rule; one of torch's operation, which leaves nothing, does not say so."""
        if native.available():
            assert [plan.rest for plan in mine._plans.values()] == rests

    def pair(self, name: str) -> tuple[Any, Any, list[Tensor], list[Tensor]]:
        cls, twin, options = CLASSES[name]
        a = [nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.randn(4))]
        b = copy.deepcopy(a)
        return cls(a, **options), twin(b, foreach=False, **options), a, b

    def step(self, mine: Any, stock: Any, a: list[Tensor], b: list[Tensor], only: slice = slice(None)) -> None:
        for p, q in zip(a, b, strict=True):
            p.grad = q.grad = None
        for p, q in zip(a[only], b[only], strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
        mine.step()
        stock.step()
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", CLASSES)
    def test_it_is_made_and_kept(self, name: str) -> None:
        mine, stock, a, b = self.pair(name)
        self.step(mine, stock, a, b)
        (plan,) = mine._plans.values()
        self.leaves(mine, [[]])
        self.step(mine, stock, a, b)
        assert list(mine._plans.values()) == [plan]

    @pytest.mark.parametrize("name", CLASSES)
    def test_gradients_come_and_go(self, name: str) -> None:
        mine, stock, a, b = self.pair(name)
        for only in (slice(0, 1), slice(None), slice(1, 2), slice(0, 0), slice(None)):
            self.step(mine, stock, a, b, only)

    @pytest.mark.parametrize("name", CLASSES)
    def test_state_is_replaced(self, name: str) -> None:
        mine, stock, a, b = self.pair(name)
        self.step(mine, stock, a, b)
        for optimizer, ps in ((mine, a), (stock, b)):
            for key in list(optimizer.state[ps[0]]):
                value = optimizer.state[ps[0]][key]
                optimizer.state[ps[0]][key] = value.clone() if key == "step" else value * 0.5
        self.step(mine, stock, a, b)
        for optimizer, ps in ((mine, a), (stock, b)):
            optimizer.state[ps[1]] = {k: v.clone() for k, v in optimizer.state[ps[1]].items()}
        self.step(mine, stock, a, b)
        for key, value in mine.state[a[1]].items():
            torch.testing.assert_close(value, stock.state[b[1]][key], rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("name", CLASSES)
    def test_parameters_move_to_another_layout(self, name: str) -> None:
        mine, stock, a, b = self.pair(name)
        self.step(mine, stock, a, b)
        for ps in (a, b):
            ps[0].data = ps[0].data.to(memory_format=torch.channels_last)
        for _ in range(3):
            self.step(mine, stock, a, b)

    @pytest.mark.parametrize("name", CLASSES)
    def test_a_group_is_added_and_options_change(self, name: str) -> None:
        mine, stock, a, b = self.pair(name)
        self.step(mine, stock, a, b)
        new = torch.randn(3)
        a.append(nn.Parameter(new.clone()))
        b.append(nn.Parameter(new.clone()))
        mine.add_param_group({"params": [a[2]], "lr": 0.5})
        stock.add_param_group({"params": [b[2]], "lr": 0.5})
        self.step(mine, stock, a, b)
        for optimizer in (mine, stock):
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.param_groups[0]["weight_decay"] = 0.3
        self.step(mine, stock, a, b)
        mine.param_groups[0]["foreach"] = False
        self.step(mine, stock, a, b)

    @pytest.mark.parametrize("name", CLASSES)
    def test_a_loaded_checkpoint_is_what_is_stepped(self, name: str) -> None:
        mine, stock, a, b = self.pair(name)
        self.step(mine, stock, a, b)
        mine.load_state_dict(stock.state_dict())
        for _ in range(2):
            self.step(mine, stock, a, b)

    @pytest.mark.parametrize("name", CLASSES)
    def test_a_plan_for_each_set_of_gradients(self, name: str) -> None:
        """As where experts take turns: each set is planned once."""
        mine, stock, a, b = self.pair(name)
        plans = set()
        for only in (slice(0, 1), slice(1, 2), slice(0, 1), slice(1, 2), slice(None)) * 2:
            self.step(mine, stock, a, b, only)
            plans |= set(map(id, mine._plans.values()))
        if name != "SGD":  # whose state grows at the second step
            assert len(mine._plans) == 3
        mine.state[a[0]] = dict(mine.state[a[0]])
        stock.state[b[0]] = dict(stock.state[b[0]])
        self.step(mine, stock, a, b)

    def test_what_the_rule_took_once_the_kernel_takes_when_it_can(self) -> None:
        mine, stock, a, b = self.pair("AdamW")
        b[0].grad = torch.randn(3, 3, 6, 4).permute(2, 3, 0, 1)
        a[0].grad = b[0].grad
        b[1].grad = a[1].grad = torch.randn(4)
        mine.step()
        stock.step()
        self.leaves(mine, [[0]])
        self.step(mine, stock, a, b)
        self.leaves(mine, [[]])

    def test_a_dtype_without_kernel_does_not_keep_the_others_from_it(self) -> None:
        a = [nn.Parameter(torch.randn(5, dtype=torch.complex64)), nn.Parameter(torch.randn(4))]
        b = [nn.Parameter(p.detach().clone()) for p in a]
        mine, stock = ours.AdamW(a), torch.optim.AdamW(b, foreach=False)
        for _ in range(2):
            self.step(mine, stock, a, b)
        self.leaves(mine, [[0]])

    def test_state_follows_a_parameter_that_becomes_wider_and_the_kernel_goes_on(self) -> None:
        a = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(4))]
        mine = ours.AdamW(a)
        for p in a:
            p.grad = torch.ones_like(p)
        mine.step()
        a[0].data, a[0].grad = a[0].data.double(), None
        a[0].grad = torch.ones(5, dtype=torch.float64)
        for _ in range(2):
            mine.step()
        assert mine.state[a[0]]["exp_avg"].dtype == torch.float64
        self.leaves(mine, [[]])

    def test_a_first_step_by_kernel_and_rule_together(self) -> None:
        """SGD's first momentum is the gradient itself, also for the tensors that the kernel leaves to the rule."""
        base = torch.randn(8, 6)
        a = [nn.Parameter(torch.randn(5)), nn.Parameter(base.clone()[:, ::2])]
        b = [nn.Parameter(p.detach().clone()) for p in a]
        mine = ours.SGD(a, lr=0.1, momentum=0.9, dampening=0.5)
        stock = torch.optim.SGD(b, lr=0.1, momentum=0.9, dampening=0.5)
        for _ in range(3):
            self.step(mine, stock, a, b)
        self.leaves(mine, [[1]])
