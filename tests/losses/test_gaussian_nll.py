from tests.functions import table


@table("gaussian_nll_loss")
def test_gaussian_nll_loss(row, check):
    check(row)
