from tests.functions import table


@table("softplus")
def test_softplus(row, check):
    check(row)
