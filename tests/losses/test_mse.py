from tests.functions import table


@table("mse_loss")
def test_mse_loss(row, check):
    check(row)
