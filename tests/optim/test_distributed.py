"""DTensor, FSDP2 and DDP on two processes over gloo: sharded training is unsharded training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if not dist.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

from tests.optim.distributed import SCENARIOS, serve


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios run in one pair of processes: their start is what takes the time."""
    folder = tmp_path_factory.mktemp("distributed")
    mp.spawn(serve, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(reports: Path, scenario: str) -> None:
    for rank in range(2):
        report = reports / f"{scenario}.{rank}"
        assert report.exists(), "the process ended early"
        assert not report.read_text(), report.read_text()


def test_nothing_is_left_initialised(reports: Path) -> None:
    assert not dist.is_initialized()
    assert torch.get_num_threads() >= 1
