import pytest
import torch

from tests.functions import table
from torchcalc.functional import softcap


@table("softcap")
def test_softcap(row, check):
    check(row)


@pytest.mark.parametrize("cap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cap_is_positive_and_finite(cap):
    with pytest.raises(ValueError, match=f"cap={cap}: what the result stays below, > 0 and finite"):
        softcap(torch.ones(2), cap)
