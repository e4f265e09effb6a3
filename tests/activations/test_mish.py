from tests.functions import table


@table("mish")
def test_mish(row, check):
    check(row)
