"""Several processes train as one does: the mean of the loss, sharded weights, checkpoints that others go on with."""

import pytest
import torch.distributed as dist

if not dist.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

from tests.resume.lightning_processes import exact_resume
from tests.resume.processes import fully_sharded, spawn
from torchcalc.distributed import normalizer


@pytest.mark.slow
def test_checkpoints_of_one_two_and_four_processes(tmp_path):
    for world in (1, 2, 4, 1, 2):
        spawn(fully_sharded, world, tmp_path)


@pytest.mark.slow
def test_exact_resume(tmp_path):
    spawn(exact_resume, 2, tmp_path)


def test_divided_by():
    with pytest.raises(ValueError, match="divided_by=0: must be at least 1"):
        normalizer(3, divided_by=0)
