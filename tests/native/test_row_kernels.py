"""Row kernels for GPUs: their meaning in Triton's interpreter, and what they compile to for three targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import compiled, interpreter
from torchcalc.native import row_kernels

pytestmark = interpreter.needs_triton


def test_in_the_interpreter() -> None:
    interpreter.run(str(Path(__file__).with_name("on_device.py")))


@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_compile(dtype: torch.dtype, target: str) -> None:
    for even, whole in ((True, True), (True, False), (False, False)):
        forward = compiled.compile(row_kernels._forward(4096, dtype, even, whole, False, False), target)
        backward = compiled.compile(row_kernels._backward(4096, dtype, even, whole, False, False, False), target)
        # Of a thread, each 16 bytes wide: in a row's whole blocks, and in its last.
        accesses = 4096 * dtype.itemsize // (32 * 8 * 16) * (even + (even and whole))
        for product in (forward, backward):
            assert product.spills == 0
            assert product.registers <= 128
            if product.backend == "cuda":
                assert product.wide_loads == accesses
        if forward.backend == "cuda":
            assert backward.wide_stores == accesses


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_weights_smoothing_and_the_sum_compile(target: str) -> None:
    for dtype in (torch.float64, torch.float16):
        for kernel in (
            row_kernels._forward(1024, dtype, True, True, True, True),
            row_kernels._backward(1024, dtype, True, True, True, True, True),
            row_kernels._sum(dtype),
            row_kernels._forward_images(dtype, True, True),
            row_kernels._backward_images(dtype, True, True, True),
            row_kernels._slopes(1024, dtype, True, False),
        ):
            assert compiled.compile(kernel, target).spills == 0
