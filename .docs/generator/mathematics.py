"""The plain-text mathematics of the files' docstrings as HTML.

An indented block is displayed: each line a formula, with its number at the right and an anchor that the text's (1) leads
to. Subscripts, superscripts and variables are set as such; fractions stay as they are written, since what a / divides
cannot be told from the text alone. A block without numbers, such as a table, stays preformatted.
"""

from __future__ import annotations

import html
import re

from generator.public import ROLE, link

__all__ = ["formula", "inline", "markdown", "papers", "prose", "title"]

_GROUP = r"(?:\((?:[^()]|\([^()]*\))*\)|\{[^{}]*\})"
_POWER = re.compile(rf"\^({_GROUP}|[-−]?(?:½|\d+|\|\w\||[^\W\d_]+)'?)")  # e^βx has βx in its exponent
_INDEX = re.compile(rf"_({_GROUP}|[A-Za-z0-9Ͱ-Ͽ]+)")
_INLINE = re.compile(
    rf"(?<![\w`])[^\W\d_][\u0300-\u036f]?_(?:{_GROUP}|[ijkn]{{2}}|\w)(?![\w(])|(?<=[\w)])\^{_GROUP}|\b[^\W\d_]\^[-−]?\w\b|(?<=[\w)|])\^(?:[-−]?½|[a-z]\b)|\b[^\W\d_]\^-\|\w\||(?<=\))_[ijkn]{{1,2}}\b"
)
_NUMBERED = re.compile(r"^(?=.{80}|.*\s{2,}\(\d+'?\)\s*\.?$)(.*?)\s+\((\d+'?)\)\s*\.?$")
_CODE = re.compile(r"(``[^`]+``|`[^`]+`|:\w+:`[^`]+`)")


def formula(text: str) -> str:
    """One line of mathematics as HTML."""
    out, at, base = [], 0, False
    while at < len(text):
        rest = text[at:]
        if text[at] == "^" and (found := _POWER.match(rest)):
            out.append(f"<sup>{formula(_bare(found[1]))}</sup>")
        elif text[at] == "_" and base and (found := _INDEX.match(rest)):
            out.append(f"<sub>{formula(_bare(found[1]))}</sub>")
        elif found := re.match(r"[A-Za-zȦͰ-ϿḀ-ỿℓ]+", rest):  # Ȧ, Ṡ and their like are tangents
            word = found[0]
            base = len(word) == 1
            product = bool(re.match("[A-Z][a-z]_", rest))  # Hv_k, whose index is that of v
            apart = re.search(r"(^|[a-z]{2}\s+|[:,;.] )$", text[:at]) and re.match(r"a [a-z]{2}", rest)
            no_variable = (word == "a" and apart) or (word == "s" and text[:at].endswith("'"))
            # Σ and Φ are no variables; μm is a product of two.
            variables = (
                (base and (word.isascii() or word in "Ȧ" or word >= "Ḁ")) or "α" <= word[0] <= "ω"
            ) and not no_variable
            base = base or product
            variables = variables or product
            out.append("".join(f"<i>{letter}</i>" for letter in word) if variables else html.escape(word))
        elif found := re.match(r" {2,}", rest):
            out.append("&emsp;" * min(4, len(found[0]) // 2))
            base = False
        else:
            found = re.match(r".", rest)
            assert found
            out.append(html.escape(found[0]))
            base = (base and "\u0300" <= found[0] <= "\u036f") or found[0] in "∂Σ)"
        at += found.end()
    return "".join(out)


def _bare(group: str) -> str:
    return group[1:-1] if group.startswith(("(", "{")) else group


def prose(text: str, numbers: frozenset[str] = frozenset()) -> str:
    """Running text as Markdown: its characters mean themselves, its (1) leads to equation 1, papers are linked."""
    parts = enumerate(_CODE.split(text))
    return "".join(ROLE.sub(link, part) if i % 2 else _plain(part, numbers) for i, part in parts)


def _plain(text: str, numbers: frozenset[str]) -> str:
    pieces, at = [], 0
    for found in _INLINE.finditer(text):
        pieces += [_escaped(text[at : found.start()], numbers), _inline(found[0])]
        at = found.end()
    return "".join([*pieces, _escaped(text[at:], numbers)])


def _inline(text: str) -> str:
    """What _INLINE finds: a power or an index of what stands before it, or both parts."""
    mark = {"^": "sup", "_": "sub"}.get(text[0])
    return f"<{mark}>{formula(_bare(text[1:]))}</{mark}>" if mark else formula(text)


def inline(text: str) -> str:
    """A docstring's text with the mathematics in it set, but for its code."""
    parts = enumerate(_CODE.split(text))
    return "".join(part if i % 2 else _INLINE.sub(lambda found: _inline(found[0]), part) for i, part in parts)


def _escaped(text: str, numbers: frozenset[str]) -> str:
    text = re.sub(r"([\\*_\[\]#|])", r"\\\1", html.escape(text, quote=False))
    text = re.sub(r"(?<!\w)\\\*([A-Za-z][\w -]*)\\\*(?!\w)", r"*\1*", text)  # emphasis
    text = re.sub(r"\((\d+'?)\)", lambda n: f"[({n[1]})](#{anchor(n[1])})" if n[1] in numbers else n[0], text)
    return papers(text)


def papers(text: str) -> str:
    """Papers as links."""

    def doi(found: re.Match[str]) -> str:
        place = found[1].replace("\\", "").replace("(", "%28").replace(")", "%29")
        return f"[doi:{found[1]}](https://doi.org/{place})"

    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"doi:(10\.\d+/(?:\([^)\s]*\)|[^\s,;()])*[^\s,;().])", doi, text)


def anchor(number: str) -> str:
    return "eq-" + number.replace("'", "p")


def numbers_of(text: str) -> frozenset[str]:
    """The numbers that the displayed equations of a text have."""
    found = (_NUMBERED.match(line) for line in text.splitlines() if line.startswith("    "))
    return frozenset(match[2] for match in found if match)


def markdown(text: str) -> str:
    """A file's docstring, cleaned of its indentation, as Markdown."""
    numbers = numbers_of(text)
    blocks: list[list[str]] = []
    for line in text.splitlines():
        if not line.strip():
            blocks.append([])
        elif blocks and blocks[-1] and _kind(blocks[-1][0]) in (_kind(line), "list", "doctest", "table"):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    made, last = [], ""
    for block in (block for block in blocks if block):
        kind = _kind(block[0])
        if kind == "indented" and last == "list" and not numbers_of("\n".join(block)):
            kind = "preformatted"
        made.append(_MADE[kind](block, numbers))
        last = kind
    return "\n\n".join(made)


def _kind(line: str) -> str:
    if line.startswith("    "):
        return "indented"
    if line.startswith(("===", "---")):
        return "table"
    if line.startswith(">>>"):
        return "doctest"
    return "list" if re.match(r"[-*] |\d+\. ", line) else "prose"


def _displayed(block: list[str], numbers: frozenset[str]) -> str:
    if not numbers_of("\n".join(block)) and len(block) > 1:
        return _fenced(block, numbers)
    indent = min(len(line) - len(line.lstrip()) for line in block)
    made = ['<div class="equations" markdown="0">']
    for line in block:
        found = _NUMBERED.match(line)
        body = (found[1] if found else line)[indent:]
        text = body.lstrip()
        at = f' style="padding-left:{(len(body) - len(text)) / 2:g}em"' if text != body else ""
        mark = f'<a class="number" id="{anchor(found[2])}">({found[2]})</a>' if found else ""
        made.append(f"<div><span{at}>{_columns(text)}</span>{mark}</div>")
    return "\n".join([*made, "</div>"])


def _columns(text: str) -> str:
    """A line whose parts stand apart, such as a rule and its remark: those that are aligned in the text stay so."""
    *parts, last = re.split(r"(?<=\S)(\s{4,})(?=\S)", text)
    made = [
        f'<span class="column" style="min-width:{(len(part) + len(gap)) / 2:g}em">{formula(part)}</span>'
        for part, gap in zip(parts[::2], parts[1::2], strict=True)
    ]
    return "".join(made) + formula(last)


def _fenced(block: list[str], numbers: frozenset[str]) -> str:
    indent = min(len(line) - len(line.lstrip()) for line in block)
    return "\n".join(["```text", *(line[indent:] for line in block), "```"])


def _table(block: list[str], numbers: frozenset[str]) -> str:
    """A table of two columns in reStructuredText, between rules."""
    text = re.sub(r"\n\s+", " ", "\n".join(line for line in block if not line.startswith("=")))  # a row goes on
    rows = [re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines()]
    return "\n".join(["| | |", "|---|---|", *(f"| {prose(a)} | {prose(b)} |" for a, b in rows)])


_MADE = {
    "prose": lambda block, numbers: prose("\n".join(block), numbers),
    "list": lambda block, numbers: "\n".join(
        re.sub(r"^(\s*)(\\\*|-)", r"\1-", re.sub(r"^ {2}(?=\S)", "    ", prose(line, numbers))) for line in block
    ),
    "indented": _displayed,
    "preformatted": _fenced,
    "table": _table,
    "doctest": lambda block, numbers: "\n".join(["```pycon", *block, "```"]),
}


def title(doc: str) -> tuple[str, str, str]:
    """(name, what it is in a formula, the rest) of a file's docstring."""
    first, _, rest = doc.partition("\n\n")
    name, colon, what = " ".join(first.split("\n")).partition(":  ")
    if found := re.search(r"\.?\s{4,}(\S.* \d{4}.*)$", what):  # who found it, to the right of the formula
        what, rest = what[: found.start()], f"{rest}\n\nReference: {found[1]}."
    return (name, what.strip(), rest) if colon else (first.rstrip("."), "", rest)
