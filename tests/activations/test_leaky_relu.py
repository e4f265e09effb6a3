from tests.functions import table


@table("leaky_relu")
def test_leaky_relu(row, check):
    check(row)
