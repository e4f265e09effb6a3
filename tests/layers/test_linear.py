from tests.functions import table


@table("linear")
def test_linear(row, check):
    check(row)
