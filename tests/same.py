"""Whether two states are equal to the last bit: tensors in any nest of dicts, lists and numbers."""

from typing import Any

import torch
from torch import Tensor


def same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit."""
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda said: f"{where}: {said}")
    elif isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where
