"""Pointwise kernels for GPUs: their meaning in Triton's interpreter, and what they compile to for three targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import torchcalc.functional  # noqa: F401  which defines the formulas
from tests import compiled, interpreter
from tests.formula.on_device import ELU, GELU, MSE, SILU, TANH, WEIGHTED
from torchcalc.formula import launch
from torchcalc.formula.pointwise import FORMULAS

pytestmark = interpreter.needs_triton


def test_in_the_interpreter() -> None:
    interpreter.run(str(Path(__file__).with_name("on_device.py")))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def kernel(formula: object, kind: object, dtype: torch.dtype, lacking: int | None = None) -> launch.gpu.Kernel:
    count = {"value": len(formula.inputs) + 1, "loss": len(formula.inputs) + 1}.get(kind, len(formula.inputs) + 3)
    dtypes = [None if i == lacking else dtype for i in range(count - isinstance(kind, tuple))]
    return launch._make(formula, kind, dtypes, True).kernel


@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("formula", [GELU, TANH], ids=lambda f: f.name)
def test_pointwise_kernels_compile(formula: object, dtype: torch.dtype, target: str) -> None:
    product = compiled.compile(kernel(formula, 0, dtype, 1 if formula is TANH else 2), target)
    assert product.spills == 0
    assert product.registers <= 128
    if product.backend == "cuda":
        accesses = launch.BLOCK * dtype.itemsize // (32 * launch.WARPS * 16)  # of a thread, each 16 bytes wide
        assert product.wide_loads == 2 * accesses and product.wide_stores == accesses


@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize("name", ["SwiGLU", "GEGLU"])
def test_gradients_with_the_value_compile(name: str, target: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        made = compiled.compile(launch._make(FORMULAS[name], "whole", [dtype], True).kernel, target)
        assert made.spills == 0
        if made.backend == "cuda":
            accesses = launch.BLOCK * dtype.itemsize // (32 * launch.WARPS * 16)
            assert made.wide_loads == 3 * accesses and made.wide_stores == 3 * accesses


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_values_and_losses_compile(target: str) -> None:
    mixed = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float64]
    for k in (
        kernel(SILU, "value", torch.float32),
        kernel(ELU, "value", torch.float16),
        kernel(MSE, "loss", torch.float32),
        launch._make(WEIGHTED, "partial", mixed, True).kernel,
        kernel(MSE, (0,), torch.float64),
        launch.total(torch.bfloat16),
    ):
        assert compiled.compile(k, target).spills == 0
