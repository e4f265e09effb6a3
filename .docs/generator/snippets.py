"""The written pages' code: run from top to bottom, with what it prints beside what the page shows.

From .docs, `python -m generator.snippets pages/guides/story.md` writes what is printed into the page's text blocks.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PAGES", "blocks", "run", "written"]

PAGES = Path(__file__).resolve().parents[1] / "pages"
_SNIPPET = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(text: str, name: str) -> Iterator[tuple[str, str | None]]:
    """(printed, shown) of each Python block of a page, which share their names; shown is None where nothing is."""
    names: dict[str, object] = {"__name__": "page"}
    for found in _SNIPPET.finditer(text):
        line = text[: found.start(1)].count("\n")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * line + found[1], name, "exec"), names)
        yield out.getvalue(), found[2]


def written(text: str, name: str) -> str:
    """The page with what its code prints."""
    printed = iter([out for out, _ in run(text, name)])

    def block(found: re.Match[str]) -> str:
        out = next(printed)
        return f"```python\n{found[1]}```" + (f"\n\n```text\n{out}```" if out else "")

    return _SNIPPET.sub(block, text)


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(written(page.read_text(), str(page)))
