"""Loaders that know where they are: after a resume they go on with the next batch, and not with the epoch's first.

:class:`Loader` is for a dataset that has a length and an index. Its order follows from the seed, the epoch and the position
alone. So it jumps to any position at no cost, and any number of processes share the same global batches:

    order(e) = permutation of N by the generator of seed (s, e);    batch k = order(e)[k·B : (k + 1)·B].          (1)

Process r of W loads the r-th of W nearly equal pieces of each batch. :class:`Replay` is for any other iterable of batches: it
remembers the generators' states at the start of the epoch, and a resume draws again the batches that had been trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset

from torchcalc.resume.randomness import rng_state, seed_of, seeded, set_rng_state

__all__ = ["Loader", "Replay"]


class Loader:
    """Batches of a map-style dataset, in an order that seed, epoch and position determine; stateful.

    Args:
        dataset: has ``len()`` and ``[index]``.
        batch_size: samples of a global batch, ≥ 1: all processes together take so many in a step.
        shuffle: a new order in every epoch; False: the dataset's own.
        seed: of the order, and of what the dataset draws at random (augmentation).
        drop_last: leave out a last batch that is smaller than the others.
        rank, world_size: which piece of each batch is loaded, and of how many; None: those of ``torch.distributed``, where
            it is initialized, else the whole batch. Under tensor parallelism give those of the data-parallel group.
        options: other arguments of ``torch.utils.data.DataLoader``, such as num_workers, collate_fn, pin_memory.

    Random numbers that the dataset draws while it loads come from generators seeded by seed, epoch, batch and rank: they
    are the same after a resume, and with any number of workers. The generators of the training are not touched.

    An epoch ends when the iterator does: then the next one begins. Who leaves an epoch early says so by ``set_epoch``, as
    Lightning does.

    Raises:
        ValueError: ``batch_size`` is not positive or smaller than the number of processes, or the last batch is.

    >>> loader = Loader(range(6), 4, seed=1)
    >>> first, second = loader
    >>> len(first), len(second)
    (4, 2)
    >>> resumed = Loader(range(6), 4, seed=1)
    >>> resumed.load_state_dict({"seed": 1, "epoch": 0, "position": 1})
    >>> [bool((batch == second).all()) for batch in resumed]
    [True]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        for name in {"sampler", "batch_sampler", "generator"} & set(options):
            raise ValueError(
                f"{name}={options[name]!r}: the order is of seed and epoch; wrap your DataLoader in Replay instead"
            )
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.drop_last, self._rank, self._world_size, self.options = drop_last, rank, world_size, options
        self.epoch, self.position = 0, 0  #: the epoch, and how many of its batches have been handed out
        self._resumed = False
        self._loader = DataLoader(
            _Drawn(dataset), batch_sampler=_Batches(self), generator=torch.Generator(device="cpu"), **options
        )

    def share(self) -> tuple[int, int]:
        """Which piece of every batch this process loads, and of how many."""
        known = dist.is_available() and dist.is_initialized()
        rank = self._rank if self._rank is not None else dist.get_rank() if known else 0
        return rank, self._world_size if self._world_size is not None else dist.get_world_size() if known else 1

    def __len__(self) -> int:
        n = len(self.dataset)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    @property
    def sampler(self) -> Loader:
        """The loader itself: Lightning calls ``sampler.set_epoch``."""
        return self

    @property
    def batch_sampler(self) -> Any:
        """What DataLoader has under this name."""
        return self._loader.batch_sampler

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless the loader is in it already."""
        if epoch != self.epoch:
            self.epoch, self.position, self._resumed = epoch, 0, False

    def order(self) -> Tensor:
        """The dataset's indices in the order of this epoch."""
        if not self.shuffle:
            return torch.arange(len(self.dataset), device="cpu")
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        return torch.randperm(len(self.dataset), generator=generator, device="cpu")  # (1)

    def batches(self) -> Iterator[list[int]]:
        """The seed and the indices of this process's piece of every batch, from the position on."""
        rank, world = self.share()
        n, b = len(self.dataset), self.batch_size
        last = b if self.drop_last or n % b == 0 else n % b
        if min(b, last) < world:
            which = (
                f"{world} processes share a batch" if b < world else f"{world} processes share a last batch of {last}"
            )
            raise ValueError(f"batch_size={b}: {which}, of which some get nothing; choose another, or drop_last=True")
        order = self.order()
        for k in range(self.position, len(self)):
            size = min(b, n - k * b)
            start, end = (k * b + size * r // world for r in (rank, rank + 1))
            yield [seed_of(self.seed, self.epoch, k, rank), *order[start:end].tolist()]

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over the epoch's batches: from the first on, or right after a resume from the next on."""
        if self.position >= len(self) > 0:
            self.epoch, self.position = self.epoch + 1, 0
        elif not self._resumed:
            self.position = 0
        return self._iterate()

    def _iterate(self) -> Iterator[Any]:
        # A generator: nothing happens before the first batch is asked for, when the epoch is known.
        self._resumed = False
        epoch = self.epoch
        for batch in self._loader:
            self.position += 1
            yield batch
        if self.epoch == epoch:
            self.epoch, self.position = epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Return seed, epoch and position."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another loader was: the next iterator begins there."""
        self.seed, self.epoch, self.position = (int(state[key]) for key in ("seed", "epoch", "position"))
        self._resumed = True


class _Batches:
    """What the DataLoader asks for the requests of an epoch."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return self.loader.batches()

    def __len__(self) -> int:
        return len(self.loader)


class _Drawn(Dataset[Any]):
    """A dataset that is asked for a seed and indices, and draws from generators of that seed."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, request: list[int]) -> list[Any]:
        seed, *indices = request
        with seeded(seed):
            if many := getattr(self.dataset, "__getitems__", None):
                return many(indices)
            return [self.dataset[i] for i in indices]


class Replay:
    """Any iterable of batches, made stateful: a resume iterates anew, from the same random state, up to where it was.

    Batches that have been trained on are loaded once more and dropped. It is exact where what is loaded follows from the
    generators of torch, NumPy and Python as they are when the epoch begins, in workers too. Those of a DataLoader with
    ``persistent_workers`` would go on with random states of their own, which nobody can read: they are started anew in every
    epoch, with a warning. A :class:`Loader` keeps them.

    Args:
        loader: the iterable, such as a ``DataLoader`` with a sampler of its own or with an IterableDataset.
        ahead: True: the batch handed out last is not trained on yet, as where Lightning does not know how many there are.

    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> loader = Replay(DataLoader(range(6), 2, shuffle=True))
    >>> batches = iter(loader)
    >>> _ = next(batches)
    >>> state = loader.state_dict()
    >>> rest = [batch.tolist() for batch in batches]
    >>> loader.load_state_dict(state)
    >>> [batch.tolist() for batch in loader] == rest
    True
    """

    def __init__(self, loader: Iterable[Any], ahead: bool = False) -> None:
        if getattr(loader, "persistent_workers", False):
            warnings.warn(
                "persistent_workers=True: the workers are started anew in every epoch, since no checkpoint can hold their "
                "random states; torchcalc.resume.Loader keeps them",
                stacklevel=2,
            )
        self.loader, self.ahead = loader, ahead
        self.position = 0  #: how many batches of this epoch have been handed out
        self._start: dict[str, Any] | None = None  # the generators when the epoch began; None: it has not
        self._before: dict[str, Any] | None = None  # the generators before the batch that was loaded ahead
        self._resumed = False

    def __getattr__(self, name: str) -> Any:
        """What the loader has: dataset, sampler, batch_sampler."""
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # a TypeError where it has none, as len() says it

    def _generators(self) -> list[torch.Generator]:
        """Generators of the loader's own."""
        owners = (self.loader, getattr(self.loader, "sampler", None))
        found = (getattr(owner, "generator", None) for owner in owners)
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over an epoch's batches, or right after a resume over those that are left."""
        if not self._resumed:
            self.position, self._start = 0, None
        return self._iterate()

    def _iterate(self) -> Iterator[Any]:
        now = rng_state()
        replays = self._resumed and self._start is not None
        if self._start is None:
            self.position = 0
            self._start = {"global": now, "own": [each.get_state() for each in self._generators()]}
        _end_workers(self.loader)
        set_rng_state(self._start["global"])
        for generator, state in zip(self._generators(), self._start["own"], strict=True):
            generator.set_state(state)
        batches = iter(self.loader)
        for _ in range(self.position):
            next(batches)
        if replays:
            set_rng_state(self._before or now)
        self._resumed = False
        while True:
            self._before = rng_state() if self.ahead else None
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches have been trained on, and the generators' states that bring the others again."""
        trained = self.position - (self.ahead and self.position > 0)
        return {"position": trained, "start": self._start, "before": self._before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader was: the next iterator begins there.

        The generators are then as they were before, apart from a batch that was loaded ahead.
        """
        self.position, self._start, self._before = int(state["position"]), state["start"], state["before"]
        self._resumed = True


def _end_workers(loader: Any) -> None:
    """Let a DataLoader with persistent workers start new ones, as Lightning does when a fit ends."""
    if getattr(loader, "persistent_workers", False) and (workers := getattr(loader, "_iterator", None)) is not None:
        workers._shutdown_workers()
        loader._iterator = None
