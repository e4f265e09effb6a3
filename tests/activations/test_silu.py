from tests.functions import table


@table("silu")
def test_silu(row, check):
    check(row)
