from tests.functions import table


@table("gelu")
def test_gelu(row, check):
    check(row)
