"""What each of two processes runs for test_distributed.py: a scenario raises, or it is right."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from tests.optim.cases import CASES, NUMBERS, build, has_tensors, run
from tests.resume.processes import mean_over_uneven_tokens
from torchcalc import optim as ours

SCENARIOS: dict[str, Callable[[], None]] = {"mean_over_uneven_tokens": mean_over_uneven_tokens}


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[function.__name__] = function
    return function


def serve(rank: int, folder: str) -> None:
    """Run all scenarios; write each one's traceback, or nothing, into the folder."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    for name, function in SCENARIOS.items():
        try:
            dist.barrier()
            function()
            report = ""
        except (Exception, pytest.fail.Exception):
            report = traceback.format_exc()
        (Path(folder) / f"{name}.{rank}").write_text(report)
    dist.barrier()  # gloo's threads let go of what was sent, for which they need an interpreter that is not ending
    dist.destroy_process_group()


def model() -> nn.Sequential:
    """Of sizes that two processes cannot share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batch(step: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def backward(net: nn.Module, x: Tensor) -> None:
    net.zero_grad()
    net(x).pow(2).mean().backward()


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def equal(a: Any, b: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@scenario
def fully_sharded_as_unsharded() -> None:
    """Every rule is elementwise, so that shards go where the whole goes, to the last bit."""
    mesh = init_device_mesh("cpu", (2,))
    ways: list[dict[str, Any]] = [{}, dict(foreach=False), dict(foreach=True)]
    for i, case in enumerate(CASES):
        for options in ways if case.cls is ours.AdamW else [ways[i % 3]]:
            config = case.configs[1] if options and not has_tensors(case.configs[1]) else case.configs[0]
            whole, sharded = model(), model()
            fully_shard(sharded, mesh=mesh)
            reference = build(case.cls, whole.parameters(), config, **options)
            optimizer = build(case.cls, sharded.parameters(), config, **options)
            for step in range(3):
                backward(whole, batch(step))
                backward(sharded, batch(step))
                reference.step()
                optimizer.step()
            for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
                assert isinstance(p, DTensor)
                # A kernel's vector loop and its remainder may round differently: 1 ulp a step.
                equal(full(p.detach()), q.detach(), **({} if options else dict(rtol=2**-21, atol=2**-24)))
                for key, x in optimizer.state[p].items():
                    assert isinstance(x, DTensor) == (key not in NUMBERS), (case.name, key)


@scenario
def distributed_checkpoint() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for case in CASES:
        if case.cls not in (ours.SGD, ours.AdamW, ours.NAdam):
            continue
        config = case.configs[1]
        first, second = model(), model()
        for net in (first, second):
            fully_shard(net, mesh=mesh)
        one = build(case.cls, first.parameters(), config, foreach=False)
        for step in range(3):
            backward(first, batch(step))
            one.step()
        saved = get_optimizer_state_dict(first, one)
        assert any(key.startswith("0.weight") for key in saved["state"])
        with torch.no_grad():
            for p, q in zip(second.parameters(), first.parameters(), strict=True):
                p.copy_(q)
        other = build(case.cls, second.parameters(), config, foreach=False)
        set_optimizer_state_dict(second, other, saved)
        for step in range(3, 5):
            for net, optimizer in ((first, one), (second, other)):
                backward(net, batch(step))
                optimizer.step()
        for p, q in zip(second.parameters(), first.parameters(), strict=True):
            equal(full(p.detach()), full(q.detach()))


@scenario
def state_dict_of_shards() -> None:
    mesh = init_device_mesh("cpu", (2,))
    net = model()
    fully_shard(net, mesh=mesh)
    optimizer = ours.AdamW(net.parameters())
    backward(net, batch(0))
    optimizer.step()
    state_dict = optimizer.state_dict()
    assert all(isinstance(state["exp_avg"], DTensor) for state in state_dict["state"].values())
    fresh = ours.AdamW(net.parameters())
    fresh.load_state_dict(state_dict)
    for p in net.parameters():
        mine, theirs = fresh.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]
        assert isinstance(mine, DTensor)
        assert mine is not theirs
        equal(full(mine), full(theirs))


@scenario
def placements_of_all_kinds() -> None:
    """Sharded, replicated, and gradients placed otherwise than their weight."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.arange(20.0).reshape(5, 4)
    g = x.flip(0) / 10 - 0.5
    for case in CASES:
        for foreach in (None, False, True) if case.cls is ours.AdamW else (None,):
            plain = x.clone().requires_grad_()
            reference = build(case.cls, [plain], case.configs[0], foreach=False)
            run(reference, [[g], [g]])
            for placement in (Shard(0), Shard(1), Replicate()):
                for grad_placement in (Shard(0), Replicate(), Partial()):
                    p = nn.Parameter(distribute_tensor(x.clone(), mesh, [placement]))
                    if isinstance(grad_placement, Partial):
                        grad = DTensor.from_local(g / 2, mesh, [grad_placement])
                    else:
                        grad = distribute_tensor(g, mesh, [grad_placement])
                    optimizer = build(case.cls, [p], case.configs[0], foreach=foreach)
                    for _ in range(2):
                        p.grad = grad
                        optimizer.step()
                    assert p.placements == (placement,)
                    equal(full(p.detach()), plain.detach(), rtol=2**-21, atol=2**-22)


@scenario
def sharded_and_plain_weights_side_by_side() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for case in CASES:
        for foreach in (None, False, True):
            x = torch.arange(6.0)
            plain, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            sharded = nn.Parameter(distribute_tensor(x.clone(), mesh, [Shard(0)]))
            partly = nn.Parameter(distribute_tensor(x.clone(), mesh, [Replicate()]))
            optimizer = build(case.cls, [plain, sharded, partly], case.configs[0], foreach=foreach)
            reference = build(case.cls, [other], case.configs[0], foreach=foreach)
            for _ in range(2):
                plain.grad = torch.ones(6)
                sharded.grad = distribute_tensor(torch.ones(6), mesh, [Shard(0)])
                partly.grad = DTensor.from_local(torch.full((6,), 0.5), mesh, [Partial()])
                other.grad = torch.ones(6)
                optimizer.step()
                reference.step()
            for p in (plain, sharded, partly):
                equal(full(p.detach()), other.detach(), rtol=2**-22, atol=2**-23)


@scenario
def differentiable_shards() -> None:
    """A derivative flows through the step of a DTensor."""
    mesh = init_device_mesh("cpu", (2,))
    lr = torch.tensor(0.5, requires_grad=True)
    start = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)]).requires_grad_()
    p = start.clone()
    optimizer = ours.SGD([p], lr=0.5, differentiable=True)
    p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    optimizer.step()
    (p * p).sum().backward()
    equal(full(start.grad), 2 * (torch.arange(4.0) - 0.5))
    assert lr.grad is None


@scenario
def a_backward_through_changed_shards_raises() -> None:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = ours.SGD([p], lr=0.5)
    loss = (p * p).sum()
    p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@scenario
def clipping_over_shards() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole, sharded = model(), model()
    fully_shard(sharded, mesh=mesh)
    reference = ours.SGD(whole.parameters(), lr=0.1)
    optimizer = ours.SGD(sharded.parameters(), lr=0.1, max_norm=0.05)
    backward(whole, batch(0))
    backward(sharded, batch(0))
    norm = nn.utils.clip_grad_norm_(whole.parameters(), 0.05)
    assert norm > 0.05
    reference.step()
    optimizer.step()
    equal(float(optimizer.grad_norm), norm.item(), rtol=1e-6)
    for p, q in zip(sharded.parameters(), whole.parameters(), strict=True):
        equal(full(p.detach()), q.detach(), rtol=1e-6, atol=1e-7)


@scenario
def data_parallel() -> None:
    """DDP: two halves of a batch are the whole batch, and both processes hold the same weights."""
    rank = dist.get_rank()
    for cls in (ours.SGD, ours.AdamW):
        whole, net = model(), model()
        parallel = nn.parallel.DistributedDataParallel(net)
        reference, optimizer = cls(whole.parameters(), lr=0.01), cls(parallel.parameters(), lr=0.01)
        for step in range(3):
            backward(whole, batch(step))
            backward(parallel, batch(step)[3 * rank : 3 * rank + 3])
            reference.step()
            optimizer.step()
        for p, q in zip(net.parameters(), whole.parameters(), strict=True):
            # The halves' gradients sum in another order; Adam divides by their size, which lets that show.
            equal(p.detach(), q.detach(), rtol=1e-4, atol=1e-5)
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach())
            equal(both[0], both[1])
