"""Steps on a GPU: their meaning in Triton's interpreter, and what the kernels compile to for three targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import compiled, interpreter
from torchcalc.formula.rule import record
from torchcalc.optim import cuda_kernels
from torchcalc.optim.adam import adam
from torchcalc.optim.cuda_kernels import Way
from torchcalc.optim.lion import lion
from torchcalc.optim.sgd import sgd

pytestmark = interpreter.needs_triton

ADAMW = Way(
    record(
        adam,
        ("m", "v"),
        dict(t=1.0, lr=0.1, b1=0.9, b2=0.9, eps=1e-8, weight_decay=0.1, decoupled=True),
    )
)
SGD = Way(
    record(
        sgd,
        ("b",),
        dict(first=False, lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False),
    )
)
LION = Way(record(lion, ("m",), dict(lr=0.1, b1=0.9, b2=0.9, weight_decay=0.1)))
WAYS = {"adamw": ADAMW, "sgd": SGD, "lion": LION}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(by_rows=False, controlled=False, stochastic=False, counted=False),
    "everything": dict(by_rows=True, controlled=True, stochastic=True, counted=True),
}


def test_in_the_interpreter() -> None:
    interpreter.run(str(Path(__file__).with_name("on_device.py")))


@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", WAYS)
def test_rules_compile(name: str, dtype: torch.dtype, options: str, target: str) -> None:
    way = WAYS[name]
    dtypes = (dtype,) * (2 + len(way.recording.slots))
    kernel = way.update(dtypes, aligned=True, maximize=False, **OPTIONS[options])
    result = compiled.compile(kernel, target)
    assert result.spills == 0
    if result.backend == "cuda":
        assert result.registers <= 128
        accesses = cuda_kernels.BLOCK * dtype.itemsize // (32 * cuda_kernels.WARPS * 16)  # of a thread, 16 bytes wide
        assert result.wide_loads == accesses * len(dtypes)
        assert result.wide_stores == accesses * (len(dtypes) - 1)


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_the_other_kernels_compile(target: str) -> None:
    kernels = [
        ADAMW.row_numbers("fp32", (("lr", "fp32"), ("b1", "fp32")), "fp32", True)[0],
        ADAMW.row_numbers("fp64", (), "fp64", False)[0],
        cuda_kernels.norm(torch.float32, True),
        cuda_kernels.norm(torch.bfloat16, False),
        cuda_kernels.finish(1024, scaled=True, found_inf=True, skips=True, clips=True, counts_seeds=True),
        cuda_kernels.finish(0, scaled=True, found_inf=True, skips=False, clips=False, counts_seeds=False),
        cuda_kernels.copy_addresses(),
    ]
    for kernel in kernels:
        result = compiled.compile(kernel, target)
        assert result.spills == 0
        if kernel.name == "norm" and result.backend == "cuda":
            assert (result.wide_loads > 0) == (kernel is kernels[2])
