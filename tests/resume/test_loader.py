"""The order follows from seed, epoch and position, whoever asks: any number of processes, workers and resumes."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from tests.same import same
from torchcalc.resume import Loader, Replay, rng_state


class Noisy(Dataset):
    """Its samples are their index and a number of each generator."""

    def __init__(self, n: int = 11) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([i, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def epoch(loader: Loader) -> list[list[int]]:
    return [batch[:, 0].int().tolist() for batch in loader]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "drop_last"), [(22, False), (24, False), (22, True)])
def test_pieces_make_up_the_same_batches(world, n, drop_last):
    whole = epoch(Loader(Noisy(n), 6, seed=5, drop_last=drop_last))
    pieces = [epoch(Loader(Noisy(n), 6, seed=5, drop_last=drop_last, rank=r, world_size=world)) for r in range(world)]
    joined = [[*chain(*parts)] for parts in zip(*pieces, strict=True)]
    assert joined == whole
    sizes = [[len(part) for part in parts] for parts in zip(*pieces, strict=True)]
    assert all(max(each) - min(each) <= 1 for each in sizes)
    assert sorted(chain(*whole)) == list(range(n)) or drop_last
    assert len(whole) == len(Loader(Noisy(n), 6, drop_last=drop_last))


def test_epochs_and_seeds_differ_and_repeat():
    orders = {}
    for seed in (0, 1):
        loader = Loader(Noisy(), 4, seed=seed)
        for number in range(3):
            assert loader.epoch == number
            orders[seed, number] = str(epoch(loader))
    assert len(set(orders.values())) == 6
    loader = Loader(Noisy(), 4)
    loader.set_epoch(2)
    assert str(epoch(loader)) == orders[0, 2]
    assert epoch(Loader(Noisy(), 4, shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_loading_leaves_the_generators_alone():
    before = rng_state()
    for _ in Loader(Noisy(), 4):
        pass
    same(rng_state(), before)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_resumed_anywhere_with_the_same_noise(stop, workers):
    uninterrupted = Loader(Noisy(), 4)
    whole = [*uninterrupted, *uninterrupted]
    first = Loader(Noisy(), 4, num_workers=workers)
    batches = iter(first)
    for _ in range(stop):
        next(batches)
    state = first.state_dict()
    resumed = Loader(Noisy(), 4, seed=99, num_workers=workers)
    resumed.load_state_dict(state)
    torch.testing.assert_close([*resumed, *resumed][: 6 - stop], whole[stop:], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(batch_size=0), "batch_size=0: must be at least 1"),
        (
            dict(batch_size=4, sampler=[1]),
            r"sampler=\[1\]: the order is of seed and epoch; wrap your DataLoader in Replay",
        ),
        (dict(batch_size=4, num_workers=-1), "num_workers"),
        (
            dict(batch_size=2, rank=0, world_size=3),
            "batch_size=2: 3 processes share a batch, of which some get nothing",
        ),
        (dict(batch_size=5, rank=0, world_size=3), "batch_size=5: 3 processes share a last batch of 1, of which some"),
    ],
)
def test_refused(options, says):
    with pytest.raises(ValueError, match=says):
        next(iter(Loader(Noisy(), **options)))


def test_a_replay_is_transparent():
    loader = Replay(torch.utils.data.DataLoader(Noisy(), 4))
    assert len(loader) == 3
    assert loader.dataset.n == 11
    with pytest.raises(AttributeError):
        loader.nothing  # noqa: B018
    with pytest.raises(TypeError):
        len(Replay(iter([])))


def test_persistent_workers_are_named():
    loader = torch.utils.data.DataLoader(Noisy(), 4, num_workers=1, persistent_workers=True)
    with pytest.warns(UserWarning, match="persistent_workers=True: the workers are started anew in every epoch"):
        Replay(loader)
