"""What a check found, and the table of all findings."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "Report", "Verdict"]

Verdict = Literal["ok", "error", "note", "skipped", "not checked"]
WIDTH = 120


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: the check's name.
        verdict: "ok"; "error", a wrong result; "note", a weakness of the contract; "skipped", for a check that
            does not apply, and "not checked", for one that applies but could compare nothing, with the reason as
            diagnosis.
        figure: what was measured, short: "3e-11 of 2e-9 allowed".
        diagnosis: for an error or a note what is wrong, where, by how much, and why, as far as the pattern shows it.
        cause: the cause in a few words ("constant ratio 0.5", "sign", "transposed"), empty if no pattern fits.
        details: numbers behind it, for the JSON form: index, analytic, numeric, ratio, error_bar, ...

    >>> Finding("gradient").verdict
    'ok'
    """

    check: str
    verdict: Verdict = "ok"
    figure: str = ""
    diagnosis: str = ""
    cause: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All findings about one subject; true when none is an error.

    Attributes:
        subject: the name of what was checked.
        findings: in the order of the checks.

    >>> wrong = Finding("gradient", "error", "0.5", "analytic is half", "constant ratio 0.5")
    >>> report = Report("f", (Finding("shapes"), wrong, Finding("kinks", "skipped", diagnosis="no kinks")))
    >>> bool(report), report.errors[0].cause
    (False, 'constant ratio 0.5')
    >>> print(report)
    f: 1 error, 1 held, 1 without application
      ERROR  gradient: 0.5 [constant ratio 0.5]
             analytic is half
      held: shapes
      does not apply: kinks: no kinks
    """

    subject: str
    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return not self.errors

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, check: str) -> Finding:
        """The finding of the check of that name."""
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(f"no check {check!r} in this report; there are {[f.check for f in self.findings]}")

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that are wrong results."""
        return tuple(f for f in self.findings if f.verdict == "error")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """Findings that are weaknesses of the contract."""
        return tuple(f for f in self.findings if f.verdict == "note")

    def __str__(self) -> str:
        """One screen: what is wrong first, then what is weak, what held, and what was not checked, with the reason."""
        places = {str(f.details.get("backward", "")) for f in self.errors}
        place = places.pop() if len(places) == 1 else ""  # said once, not beside every error
        lines = [f"{self.subject}: {self.verdict()}", *([f"  {place}"] if place else [])]
        for f in self.errors:
            lines += _entry("ERROR", f.check, f, f.diagnosis.removesuffix(f"\n{place}").splitlines(), 4)
        alike: dict[str, list[Finding]] = {}
        for f in self.notes:
            alike.setdefault(f.diagnosis, []).append(f)
        for first, *others in alike.values():
            names = ", ".join(f.check for f in (first, *others))
            lines += _entry("note", names, first, first.diagnosis.splitlines()[:1], 2)
        lines += _listed("held", ", ".join(f.check for f in self if f.verdict == "ok"))
        for verdict, title in (("not checked", "not checked"), ("skipped", "does not apply")):
            reasons: dict[str, list[str]] = {}
            for f in self:
                if f.verdict == verdict:
                    reasons.setdefault(textwrap.shorten(f.diagnosis, 100, placeholder=" ..."), []).append(f.check)
            lines += _listed(title, "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items()))
        return "\n".join(lines)

    def verdict(self) -> str:
        """The counts in words: "2 errors, 30 held, 3 not checked"."""
        names = {
            "error": "error",
            "note": "note",
            "ok": "held",
            "not checked": "not checked",
            "skipped": "without application",
        }
        counts = {v: sum(f.verdict == v for f in self) for v in names}
        plural = {v: "s" if v in ("error", "note") and counts[v] != 1 else "" for v in names}
        return ", ".join(f"{counts[v]} {names[v]}{plural[v]}" for v in names if counts[v] or v in ("error", "ok"))

    def json(self) -> str:
        """The report as JSON text."""
        return json.dumps(
            {"subject": self.subject, "findings": [asdict(f) for f in self.findings]}, default=str, indent=2
        )

    def raise_errors(self) -> None:
        """Raise AssertionError with the table as its message, if there are errors."""
        if not self:
            raise AssertionError(str(self))


def _entry(symbol: str, names: str, f: Finding, said: list[str], most: int) -> list[str]:
    """An error or a note, with so many lines of each paragraph of its diagnosis."""
    cause = f" [{f.cause}]" if f.cause else ""
    lines = [f"  {symbol:<6} {names}: {f.figure}{cause}"]
    return lines + [f"         {line}" for text in said for line in _wrapped(text, most)]


def _wrapped(text: str, most: int) -> list[str]:
    """The text in lines of at most WIDTH, cut after so many: the JSON form has it whole."""
    lines = textwrap.wrap(text, WIDTH - 9, break_long_words=False, break_on_hyphens=False) or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} ..."]


def _listed(title: str, text: str) -> list[str]:
    """A heading and what follows it, wrapped."""
    if not text:
        return []
    first = f"  {title}: "
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent="    ", break_on_hyphens=False)
