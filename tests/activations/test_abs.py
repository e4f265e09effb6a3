from tests.functions import table


@table("abs")
def test_abs(row, check):
    check(row)
