"""What a check found, and the table of all findings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "Report", "Verdict"]

Verdict = Literal["ok", "error", "note", "skipped", "not checked"]
SYMBOLS = {"ok": "ok", "error": "ERROR", "note": "note", "skipped": "-", "not checked": "?"}


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

    >>> report = Report("f", (Finding("gradient", "error", "0.5", "analytic is half", "constant ratio 0.5"),))
    >>> bool(report), report.errors[0].cause
    (False, 'constant ratio 0.5')
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
        width = max([len(f.check) for f in self.findings] + [5])
        lines = [self.subject, f"  {'check':<{width}}  verdict  figure"]
        for f in self.findings:
            reason = f.diagnosis if f.verdict in ("skipped", "not checked") else f.figure
            lines.append(f"  {f.check:<{width}}  {SYMBOLS[f.verdict]:<7}  {reason}".rstrip())
            if f.verdict in ("error", "note"):
                cause = f"[{f.cause}] " if f.cause else ""
                lines += [f"      {line}" for line in (cause + f.diagnosis).splitlines()]
        counts = {v: sum(f.verdict == v for f in self.findings) for v in SYMBOLS}
        names = {"ok": "passed", "error": "errors", "note": "notes", "skipped": "skipped", "not checked": "not checked"}
        lines.append("  " + ", ".join(f"{counts[v]} {names[v]}" for v in names if counts[v] or v == "ok"))
        return "\n".join(lines)

    def json(self) -> str:
        """The report as JSON text."""
        return json.dumps(
            {"subject": self.subject, "findings": [asdict(f) for f in self.findings]}, default=str, indent=2
        )

    def raise_errors(self) -> None:
        """Raise AssertionError with the table as its message, if there are errors."""
        if not self:
            raise AssertionError(str(self))
