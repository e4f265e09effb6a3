from tests.functions import table


@table("glu")
def test_glu(row, check):
    check(row)


@table("swiglu")
def test_swiglu(row, check):
    check(row)


@table("geglu")
def test_geglu(row, check):
    check(row)
