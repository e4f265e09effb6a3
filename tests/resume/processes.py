"""What each of several processes over gloo runs for test_processes.py: a scenario raises, or it is right."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from torchcalc import functional, optim
from torchcalc import nn as calc
from torchcalc.distributed import normalizer
from torchcalc.resume import Loader

IGNORED, WORDS, STEPS = -100, 11, 6


def spawn(scenario: Callable[[Path], None], world: int, folder: Path) -> None:
    """Run a scenario in so many processes; raise what any of them raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_serve, args=(scenario, world, str(port), str(folder)), nprocs=world)
    reports = [(folder / f"{scenario.__name__}.{rank}").read_text() for rank in range(world)]
    assert not any(reports), "\n".join(reports)


def _serve(rank: int, scenario: Callable[[Path], None], world: int, port: str, folder: str) -> None:
    # As torchrun does; Lightning then starts no processes of its own.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    warnings.simplefilter("ignore")  # of Lightning, gloo and torch.distributed.checkpoint
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        scenario(Path(folder))
        report = ""
    except BaseException:
        report = traceback.format_exc()
    (Path(folder) / f"{scenario.__name__}.{rank}").write_text(report)
    if not report:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)  # who waits for a process that has failed does not end otherwise


def sentences(n: int = 20) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of eight words, of which up to seven do not count."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(WORDS, (n, 9), generator=generator)
    targets = words[:, 1:].masked_fill(torch.arange(8) > torch.arange(n)[:, None] % 8, IGNORED)
    return list(zip(words[:, :-1], targets, strict=True))


class Language(nn.Module):
    """Returns the loss of a batch: what is sharded is whole within forward only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, 7)
        self.hidden = nn.Sequential(calc.RMSNorm(7), calc.Linear(7, 13), calc.SiLU(), calc.Linear(13, 7))
        self.head = calc.Linear(7, WORDS)

    def forward(self, words: Tensor, targets: Tensor, n: Tensor) -> Tensor:
        x = self.embedding(words)
        x = x + self.hidden(x)
        weight, bias = self.head.weight, self.head.bias
        return functional.linear_cross_entropy(
            x.flatten(0, 1), weight, targets.flatten(), linear_bias=bias, normalizer=n, ignore_index=IGNORED
        )


def optimizer_of(net: nn.Module) -> optim.AdamW:
    return optim.AdamW(net.parameters(), lr=0.02, max_norm=0.5)


def steps(net: nn.Module, optimizer: Any, loader: Loader, count: int, micro_batches: int = 1) -> None:
    """So many optimizer steps, each of a batch in several parts."""
    batches = iter(loader)
    for _ in range(count):
        try:
            words, targets = next(batches)
        except StopIteration:
            batches = iter(loader)
            words, targets = next(batches)
        n = normalizer((targets != IGNORED).sum())
        optimizer.zero_grad()
        for part in zip(words.tensor_split(micro_batches), targets.tensor_split(micro_batches), strict=True):
            net(*part, n).backward()
        optimizer.step()


def whole(count: int = STEPS) -> dict[str, Tensor]:
    """The weights after so many steps of one process."""
    net = Language()
    optimizer, batches = optimizer_of(net), []
    loader = Loader(sentences(), 8, seed=1, rank=0, world_size=1)
    while len(batches) < count:
        batches += [*loader]
    for words, targets in batches[:count]:
        optimizer.zero_grad()
        net(words, targets, (targets != IGNORED).sum()).backward()
        optimizer.step()
    return net.state_dict()


def close(net: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, x in net.state_dict().items():
        x = x.full_tensor() if isinstance(x, DTensor) else x
        # Sums in another order; Adam divides by the gradient's size, which lets that show.
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-5)


def mean_over_uneven_tokens() -> None:
    for micro_batches in (1, 2):
        net = Language()
        parallel = DistributedDataParallel(net)
        steps(parallel, optimizer_of(net), Loader(sentences(), 8, seed=1), STEPS, micro_batches)
        close(net, whole())
    # A mean of each process's own tokens is another loss.
    alone = Language()
    parallel, optimizer = DistributedDataParallel(alone), optimizer_of(alone)
    for words, targets in Loader(sentences(), 8, seed=1):
        optimizer.zero_grad()
        parallel(words, targets, (targets != IGNORED).sum()).backward()
        optimizer.step()
    try:
        close(alone, whole(3))
    except AssertionError:
        pass
    else:
        raise AssertionError("the test does not tell the two means apart")
    assert float(normalizer(0)) == 1
    assert float(normalizer(dist.get_rank() * 6, divided_by=3)) == 6 * sum(range(dist.get_world_size())) / 6


def sharded() -> Language:
    net = Language()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net.hidden, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def fully_sharded(folder: Path) -> None:
    """What a checkpoint of any number of processes holds, any other goes on with; two steps a time."""
    net = sharded()
    optimizer, loader = optimizer_of(net), Loader(sentences(), 8, seed=1)
    at = folder / "at"
    done = int(at.read_text()) if at.exists() else 0
    if done:
        model, state = get_state_dict(net, optimizer)
        content = {"model": model, "optimizer": state, "loader": loader.state_dict()}
        dcp.load(content, checkpoint_id=str(folder / f"step_{done}"))
        set_state_dict(net, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
        loader.load_state_dict(content["loader"])
    steps(net, optimizer, loader, 2)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    close(net, whole(done + 2))
    model, state = get_state_dict(net, optimizer)
    dcp.save(
        {"model": model, "optimizer": state, "loader": loader.state_dict()},
        checkpoint_id=str(folder / f"step_{done + 2}"),
    )
    if dist.get_rank() == 0:
        at.write_text(str(done + 2))
