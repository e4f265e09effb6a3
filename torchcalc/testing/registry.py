"""The registry of checks: each check is one small function, registered under a name for one kind of subject.

    @check("function", "gradient")
    def gradient(subject: FunctionSubject) -> Finding | Iterator[Finding] | None:
        '''First derivatives against Richardson finite differences.'''

A check gets a fresh subject, returns a Finding (None: ok), and may raise :class:`Skip` with a reason. Any other
exception out of a check is a finding too: an error, with the exception as its diagnosis.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torchcalc.testing.report import Finding
from torchcalc.testing.settings import left_alone

__all__ = ["CHECKS", "Check", "Skip", "check", "run_one", "select"]

Kind = Literal["function", "loss", "optimizer"]


class Skip(Exception):
    """Raised by a check that does not apply; the message says why.

    >>> str(Skip("it has no reduction"))
    'it has no reduction'
    """


@dataclass(frozen=True)
class Check:
    """A registered check; doc is the first line of its docstring."""

    kind: Kind
    name: str
    doc: str
    call: Callable[[Any], Finding | None]
    slow: bool = False  # compiles: only with compile=True


CHECKS: dict[tuple[str, str], Check] = {}


def check(kind: Kind, name: str, *, slow: bool = False) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a check; its docstring's first line is what lists and reports call it by.

    Args:
        kind: what it is for: "function", "loss" or "optimizer".
        name: that ``include`` and ``exclude`` know it by, and the report shows; one for each kind.
        slow: leave it out unless ``compile=True`` or it is included by name.

    Raises:
        ValueError: there is a check of this kind and name already.

    >>> @check("function", "positive")
    ... def positive(subject):
    ...     '''Values above 0.'''
    ...     return None  # ok; or Finding("positive", "error", ...), or raise Skip("...")
    >>> CHECKS.pop(("function", "positive")).doc
    'Values above 0.'
    """

    def register(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        if (kind, name) in CHECKS:
            raise ValueError(f"there is a {kind} check {name!r} already; choose another name")
        CHECKS[kind, name] = Check(kind, name, (call.__doc__ or "").strip().partition("\n")[0], call, slow)
        return call

    return register


def select(
    kinds: Iterable[Kind], include: Iterable[str] | None = None, exclude: Iterable[str] = (), slow: bool = False
) -> list[Check]:
    """The checks of some kinds in the order of registration, by name.

    Raises:
        ValueError: a name is not that of a check.
    """
    kinds = tuple(kinds)
    there = [c for c in CHECKS.values() if c.kind in kinds]
    names = {c.name for c in there}
    for name in (*(include or ()), *exclude):
        if name not in names:
            raise ValueError(f"there is no check {name!r} for {'/'.join(kinds)}; there are {sorted(names)}")
    if include is not None:
        return [c for c in there if c.name in set(include) - set(exclude)]
    return [c for c in there if c.name not in set(exclude) and (slow or not c.slow)]


def run_one(c: Check, fresh: Callable[[], Any]) -> Finding:
    """Run one check; what it raises becomes its finding."""
    with left_alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return replace(c.call(fresh()) or Finding(c.name), check=c.name)
        except Skip as reason:
            return Finding(c.name, "skipped", diagnosis=str(reason))
        except Exception as error:  # whatever a user's function does is a finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}\nin {where.name}, {where.filename}:{where.lineno}"
            return Finding(c.name, "error", "raised", text, cause=f"raises {type(error).__name__}")
