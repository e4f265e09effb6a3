from tests.functions import table


@table("huber_loss")
def test_huber_loss(row, check):
    check(row)
