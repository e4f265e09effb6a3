from tests.functions import table


@table("rms_norm")
def test_rms_norm(row, check):
    check(row)
