from tests.functions import table


@table("exp")
def test_exp(row, check):
    check(row)
