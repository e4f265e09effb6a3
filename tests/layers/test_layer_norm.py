from tests.functions import table


@table("layer_norm")
def test_layer_norm(row, check):
    check(row)
