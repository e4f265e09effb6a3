from tests.functions import table


@table("square")
def test_square(row, check):
    check(row)
