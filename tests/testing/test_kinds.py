"""Each kind of planted mistake has a table; each row is found by its check, with its cause."""

import pytest
import torch

from tests.testing.defects_losses import DEFECTS_OF_LOSSES
from tests.testing.defects_regions import DEFECTS_IN_REGIONS
from tests.testing.defects_side_effects import DEFECTS_BESIDE
from tests.testing.right_losses import RIGHT_LOSSES
from tests.testing.right_unusual import UNUSUAL
from tests.testing.test_functions import named, report_of

TABLES = {"regions": DEFECTS_IN_REGIONS, "side effects": DEFECTS_BESIDE, "losses": DEFECTS_OF_LOSSES}
QUICK = (
    "identity",
    "sine and cosine",
    "sin(1e4 x)",
    "log at 1e-5",
    "slogdet",
    "sparse embedding",
    "focal",
    "contrastive",
)
ROWS = [row for table in TABLES.values() for row in table]


@pytest.mark.parametrize("defect", named(ROWS))
def test_defect_is_found_and_its_cause_named(defect):
    found = report_of(defect, include=[defect.check])[defect.check]
    assert found.verdict == defect.verdict
    assert defect.cause in found.cause
    assert found.diagnosis


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("defect", named(ROWS))
def test_all_checks_of_all_defects(defect):
    report = report_of(defect)
    assert report[defect.check].verdict == defect.verdict, str(report)


def test_what_defects_do_beside_is_set_back():
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_anomaly_enabled()
    for row in DEFECTS_BESIDE:
        report_of(row, include=["determinism"])
    assert before == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_anomaly_enabled())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("right", named([*UNUSUAL, *RIGHT_LOSSES]))
def test_unusual_function_has_no_error(right):
    report = report_of(right)
    assert report, str(report)


@pytest.mark.parametrize("right", named([row for row in (*UNUSUAL, *RIGHT_LOSSES) if row.name in QUICK]))
def test_unusual_function_has_no_error_quick(right):
    report = report_of(right)
    assert report, str(report)
