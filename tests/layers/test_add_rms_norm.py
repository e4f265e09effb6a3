from tests.functions import table


@table("add_rms_norm")
def test_add_rms_norm(row, check):
    check(row)
