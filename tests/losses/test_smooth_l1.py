from tests.functions import table


@table("smooth_l1_loss")
def test_smooth_l1_loss(row, check):
    check(row)
