"""The rows of the tables of speed that are about one function or optimizer."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

__all__ = ["ratios"]

TABLES = Path(__file__).resolve().parents[2] / "benchmarks" / "README.md"


def tables() -> list[tuple[list[str], list[list[str]]]]:
    """(head, rows) of every table; a table of two halves side by side becomes two."""
    found = []
    for text in re.findall(r"(?:^\|.*\n)+", TABLES.read_text(), re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines())
        starts = [0]
        if "against" not in head:  # else the second column is words too
            starts += [i for i in range(2, len(head)) if any(re.match("[A-Za-z]", row[i]) for row in rows)]
        for start, stop in pairwise([*starts, len(head)]):
            heads = [name or head[0] for name in head[start:stop]] if stop - start > 1 else [head[start], "ratio"]
            found.append((heads, named([row[start:stop] for row in rows if row[start]])))
    return found


def named(rows: list[list[str]]) -> list[list[str]]:
    """With what "the same" is, and whose sizes stand alone: the row above says it."""
    made, last = [], ""
    for label, *values in rows:
        if re.match(r"the same|\d", label):
            label = f"{last}: {label}"
        else:
            last = re.split(r",? \d", label)[0]
        made.append([label, *values])
    return made


def ratios(names: list[str]) -> str:
    """The rows about these names as Markdown tables; empty where nothing was measured."""
    about: dict[tuple[str, ...], list[list[str]]] = {}
    for head, rows in tables():
        for row in rows:
            if any(re.search(rf"(?<!\w){name}(?!\w)", row[0]) for name in names):
                about.setdefault(tuple(head), []).append(row)
    return "\n\n".join(
        "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])
        for head, rows in about.items()
    )
