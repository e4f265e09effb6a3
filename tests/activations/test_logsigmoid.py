from tests.functions import table


@table("logsigmoid")
def test_logsigmoid(row, check):
    check(row)
