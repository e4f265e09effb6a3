from tests.functions import table


@table("log")
def test_log(row, check):
    check(row)
