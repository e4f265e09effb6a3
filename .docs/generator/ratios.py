"""The rows of the tables of speed that are about one function or optimizer."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

__all__ = ["ratios", "slower"]

TABLES = Path(__file__).resolve().parents[2] / "benchmarks" / "README.md"


#: Columns that are about a run, not about what was measured.
LEFT_OUT = ("target", "limit", "of limit")


def tables() -> list[tuple[str, list[str], list[list[str]]]]:
    """(machine, head, rows) of every table; a table of two halves side by side becomes two."""
    found = []
    page = TABLES.read_text()
    on_gpu = page.index("On an H100")
    for table in re.finditer(r"(?:^\|.*\n)+", page, re.MULTILINE):
        text, machine = table[0], "On an H100" if table.start() > on_gpu else "On two threads of a CPU"
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines())
        starts = [0]
        if "against" not in head:  # else the second column is words too
            starts += [i for i in range(2, len(head)) if any(re.match("[A-Za-z]", row[i]) for row in rows)]
        for start, stop in pairwise([*starts, len(head)]):
            heads = [name or head[0] for name in head[start:stop]] if stop - start > 1 else [head[start], "ratio"]
            keep = [i for i, name in enumerate(heads) if name not in LEFT_OUT]
            half = named([row[start:stop] for row in rows if row[start]])
            found.append((machine, [heads[i] for i in keep], [[row[i] for i in keep] for row in half]))
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
    for machine, head, rows in tables():
        for row in rows:
            if any(re.search(rf"(?<!\w){name}(?!\w)", row[0]) for name in names):
                about.setdefault((machine, *head), []).append(row)
    return "\n\n".join(
        f"{machine}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])
        for (machine, *head), rows in about.items()
    )


def slower(than: float) -> list[tuple[str, str, float]]:
    """(machine, label, ratio) of each row that has a ratio below a number."""
    found = []
    for machine, head, rows in tables():
        columns = [i for i, name in enumerate(head) if name == "ratio"] or range(1, len(head))
        for label, *values in rows:
            numbers = [float(n) for i in columns for n in re.findall(r"\d+\.\d+", values[i - 1])]
            found += [(machine, label, min(numbers))] if numbers and min(numbers) < than else []
    return found
