from tests.functions import table


@table("tanh")
def test_tanh(row, check):
    check(row)
