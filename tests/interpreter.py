"""Triton's interpreter, which runs kernels on CPU tensors: for tests of their meaning without a GPU.

Triton decides at its import whether it interprets, so such tests run in a process of their own: :func:`run` starts pytest on
a file with TRITON_INTERPRET=1; in that process the file calls :func:`mend`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str) -> None:
    """Run pytest in the interpreter, and fail with its words if it fails."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    command += ["-W", "ignore::RuntimeWarning"]  # NumPy's, of inf − inf
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def mend() -> None:
    """Let the interpreter do what a GPU does: it rounds bfloat16 wrongly, and its tensors are on the CPU.

    Triton 3.6 also takes int() of an array of one element, which NumPy refuses from 2.4 on.
    """
    from triton.runtime import interpreter

    import torchcalc.optim.optimizer

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source.name, target.name) == ("fp32", "bf16"):
            array = np.ascontiguousarray(data).view(np.float32)
            return torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode)

    interpreter._convert_float = rounded
    patch = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index_too
    torchcalc.optim.optimizer.check_capturable = lambda *_: None
