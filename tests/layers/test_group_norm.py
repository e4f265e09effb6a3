from tests.functions import table


@table("group_norm")
def test_group_norm(row, check):
    check(row)
