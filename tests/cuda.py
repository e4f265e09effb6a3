"""The tests that a GPU can run: ``make test-cuda``, or ``python3 -m tests.cuda [pytest's arguments]`` anywhere.

It needs torch with its Triton, pytest, and a CUDA device; nothing is installed, and no kernels for the CPU are built. With
pytest-xdist it takes up to sixteen processes. These run there: the kernels' own tests, and the tables of functions and
optimizers with their tensors on the device. With ``$OUT`` set, the outcome is also in
``$OUT/test-cuda.json``, and what failed, as it fails, in ``$OUT/test-cuda-failures.txt``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BUDGET = 175.0  # seconds, after which the tests that are left are not begun

FILES = (
    "tests/optim/on_device.py", "tests/formula/on_device.py", "tests/native/on_device.py", "tests/optim/test_parity.py",
    "tests/activations", "tests/losses", "tests/layers",
)  # fmt: skip
#: Checks of a function that compile take seconds each: they run where several processes share them.
SLOW = ("compiled", "compiled_functional", "compiled_by_inductor", "exported")

_start = time.monotonic()
_outcomes: Counter[str] = Counter()
_failed: list[str] = []


def belongs(item: pytest.Item) -> bool:
    """Whether the test makes its tensors on the device."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if item.path.name == "on_device.py":
        return True
    if "check" in params and "row" in params:
        return "PYTEST_XDIST_WORKER" in os.environ or params["check"].__name__ not in SLOW
    return params.get("device") == "cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not belongs(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if belongs(item)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - _start > BUDGET:
        pytest.skip("no time is left")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.outcome] += 1
        if report.outcome == "failed":
            _failed.append(report.nodeid)
            if out := os.environ.get("OUT"):
                with Path(out, "test-cuda-failures.txt").open("a") as file:
                    file.write(f"{report.nodeid}\n{report.longreprtext[-2000:]}\n\n")


def main() -> int:
    from benchmarks.cuda import head

    print(head(), flush=True)
    if not torch.cuda.is_available():
        print("test-cuda: not run, for there is no CUDA device")
        return 0
    os.environ["TORCHCALC_TEST_DEVICE"] = "cuda"
    arguments = [
        "-p",
        "tests.cuda",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "minversion=0",
        "-o",
        "filterwarnings=default",
    ]
    arguments += ["--no-header", "--disable-warnings", "--maxfail=200", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(16, os.cpu_count() or 1))]
    os.chdir(ROOT)
    sys.modules["tests.cuda"] = sys.modules[__name__]  # the plugin is this module, and counts here
    code = int(pytest.main([*arguments, *(sys.argv[1:] or FILES)]))
    summary = f"{_outcomes['passed']} passed, {_outcomes['failed']} failed, {_outcomes['skipped']} skipped"
    if out := os.environ.get("OUT"):
        report = {"on": head(), **_outcomes, "failures": _failed, "seconds": round(time.monotonic() - _start)}
        Path(out, "test-cuda.json").write_text(json.dumps(report, indent=1))
    print(f"test-cuda: {summary}, {time.monotonic() - _start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
