from tests.functions import table


@table("l1_loss")
def test_l1_loss(row, check):
    check(row)
