from tests.functions import table


@table("poisson_nll_loss")
def test_poisson_nll_loss(row, check):
    check(row)
