from tests.functions import table


@table("elu")
def test_elu(row, check):
    check(row)
