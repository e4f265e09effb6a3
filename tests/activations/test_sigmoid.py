from tests.functions import table


@table("sigmoid")
def test_sigmoid(row, check):
    check(row)
