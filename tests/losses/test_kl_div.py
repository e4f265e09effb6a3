import pytest

from tests.functions import table


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@table("kl_div")
def test_kl_div(row, check):
    check(row)
