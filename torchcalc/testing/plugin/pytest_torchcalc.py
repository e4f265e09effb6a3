"""``pytest --check-function package.module:name``: one test for each check of a function, loss or optimizer.

    pytest --check-function mine.ops:SiLU --check-input 3,4
    pytest tests --check-function mine.losses:Huber --check-function mine.optim:Lamb

Without the flag nothing is imported: when installed this file lies beside the package, for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torchcalc")
    flag = dict(action="append", default=[])
    group.addoption(
        "--check-function", metavar="MODULE:NAME", help="check a function, loss or optimizer; may be repeated", **flag
    )
    group.addoption(
        "--check-input", metavar="SHAPE[:KIND]", help="its example inputs, as of python -m torchcalc.testing", **flag
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With the flag and without paths only the checks run."""
    given = config.args_source is pytest.Config.ArgsSource.ARGS
    return True if config.getoption("check_function") and not given else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    for path in config.getoption("check_function"):
        items.extend(_items(session, path, config.getoption("check_input")))


def _items(session: pytest.Session, path: str, texts: list[str]) -> Iterator[pytest.Item]:
    from torchcalc import testing
    from torchcalc.testing import __main__ as command

    try:
        subject: Any = command.load(path)
        kind = command.kind_of(subject)
        if kind == "optimizer":
            test: Any = testing.pytest_optimizer(subject)
        else:
            make = testing.pytest_loss if kind == "loss" else testing.pytest_function
            test = make(command.instance(path, subject), *command.examples(kind, texts), name=path)
    except ValueError as error:
        raise pytest.UsageError(f"--check-function {path}: {error}") from error
    (mark,) = test.pytestmark
    for check, name in zip(mark.args[1], mark.kwargs["ids"], strict=True):
        yield CheckItem.from_parent(session, name=f"{path}[{name}]", call=lambda check=check: test(check))


class CheckItem(pytest.Item):
    """One check; what it finds wrong is the test's failure."""

    def __init__(self, *, call: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.call = call

    def runtest(self) -> None:
        self.call()

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        return str(excinfo.value) if excinfo.errisinstance(AssertionError) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name
