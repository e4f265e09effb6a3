"""Docstrings as mkdocstrings reads them, and what each argument of a public name means, wherever that is said."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import griffe
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # griffe loads this file by its path
from generator.mathematics import inline, papers, prose
from generator.public import ROLE, link, targets

__all__ = ["Docstrings", "arguments", "linked"]

_ENTRY = re.compile(
    r"^( {4,8})(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)\n]*\))?: (.*(?:\n\1 +.*|\n(?=\n\1 {2}))*)", re.MULTILINE
)
_ARGS = re.compile(r"^Args:.*(?:\n +.*|\n(?=\n +))*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Takes the docstrings that classes have at run time, links their references, and gives each argument its own line."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        if obj.is_class:
            cls = getattr(importlib.import_module(obj.module.path), obj.name, None)
            if obj.path.startswith("torchcalc.optim."):
                obj.docstring.value = inspect.getdoc(cls) or obj.docstring.value  # which `documented` has completed
        if not obj.is_module:
            value = obj.docstring.value if _has_no_table(obj) else _ARGS.sub("", obj.docstring.value)
            if (
                isinstance(obj, griffe.Function) and obj.returns is not None
            ):  # else what stands before a colon is taken for the type
                value = re.sub(r"^Returns:\n    (?=\S)", f"Returns:\n    {obj.returns}: ", value, flags=re.MULTILINE)
            obj.docstring.value = linked(apart(one_error_a_line(value)))


def _has_no_table(obj: griffe.Object) -> bool:
    """Whether its page shows the section Args of its docstring: of a module it has a table of all arguments instead."""
    owner = obj.parent if obj.name == "__init__" else obj
    cls = getattr(importlib.import_module(obj.module.path), owner.name, None) if owner and owner.is_class else None
    return not (inspect.isclass(cls) and issubclass(cls, torch.nn.Module))


def apart(doc: str) -> str:
    """With the arguments that are explained together each explained alone: `low, high: the range.`"""

    def split(entry: re.Match[str]) -> str:
        return "\n".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", "))

    before, mark, sections = (
        re.split(r"(^(?:Args|Attributes):\n)", doc, maxsplit=1, flags=re.MULTILINE)
        if re.search(r"^(?:Args|Attributes):\n", doc, re.MULTILINE)
        else (doc, "", "")
    )
    section, gap, after = sections.partition("\n\n")
    return before + mark + re.sub(_ENTRY, split, section) + gap + after


def one_error_a_line(doc: str) -> str:
    """With each exception of a section Raises on a line of its own."""
    before, mark, section = doc.partition("\nRaises:\n")
    section, gap, after = section.partition("\n\n")
    section = re.sub(r"(?<=[.;]) (?=(?:When called, )?[A-Z]\w*(?:Error|Exception): )", "\n    ", section)
    return before + mark + section + gap + after


def linked(doc: str) -> str:
    """References as links, papers too, what differs from torch as a box; examples stay as they are."""
    paragraphs = []
    for paragraph in doc.split("\n\n"):
        if paragraph.startswith(">>>"):
            paragraph = f"```pycon\n{paragraph.rstrip()}\n```"
        elif not paragraph.lstrip().startswith(">>>"):
            paragraph = inline(papers(ROLE.sub(link, paragraph)))
            if found := re.match(r"Differs from torch[:,] ?", paragraph):
                body = paragraph[found.end() :].replace("\n", "\n    ")
                paragraph = f'!!! note "Differs from torch"\n\n    {body}'
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def entries(doc: str | None, sections: str = "Args|Attributes|Parameters") -> dict[str, str]:
    """Argument to its explanation, of these sections of a docstring."""
    found: dict[str, str] = {}
    for section in re.finditer(
        rf"^(?:{sections}):\n(.*?)(?=^\S|\Z)", inspect.cleandoc(doc or ""), re.MULTILINE | re.DOTALL
    ):
        for entry in _ENTRY.finditer(section[1]):
            for name in entry[2].replace("*", "").split(", "):
                found[name] = " ".join(entry[3].split())
    return found


def arguments(value: Any) -> dict[str, str]:
    """What each argument of a public function or class means; empty where that is said nowhere.

    Said in its own docstring; for a module in that of its function; for what torch's class of that name has, in torch's.
    """
    told: dict[str, str] = {}
    if inspect.isclass(value):
        for parent in reversed(value.__mro__[1:]):
            if parent.__module__.startswith("torch.nn"):
                told.update({name: _without_rst(text) for name, text in entries(parent.__doc__, "Args").items()})
            elif parent.__module__.startswith("torchcalc."):
                told.update(entries(parent.__doc__))
    for role in ROLE.finditer(value.__doc__ or ""):
        if (full := targets().get(role[2])) and not full.endswith("." + value.__name__):
            module, _, name = full.rpartition(".")
            function = getattr(importlib.import_module(module), name)
            told.update(
                {name: text for name, text in entries(function.__doc__).items() if _same(name, value, function)}
            )
    own = entries(value.__doc__)
    told.update(
        {name: text for name, text in own.items() if not (name in told and text.startswith(("of :", "as for :")))}
    )
    names = [name for name in inspect.signature(value).parameters if name != "self" and not name.startswith("_")]
    if issubclass(value, torch.nn.Module) if inspect.isclass(value) else False:
        names = [name for name in names if name not in ("args", "kwargs")]  # of modules that take nothing
        told.setdefault("device", "where parameters are made, as in torch.")
        told.setdefault("dtype", "of parameters, as in torch.")
    return {name: told.get(name, "") for name in names}


def _same(name: str, value: Any, function: Any) -> bool:
    """Whether an argument means the same of both: bias is a tensor of a function, and of a module whether there is one."""
    ours, theirs = (inspect.signature(each).parameters.get(name) for each in (value, function))
    return not (ours and theirs and isinstance(ours.default, bool) and not isinstance(theirs.default, bool))


def _without_rst(text: str) -> str:
    """The first sentence of torch's explanations, which are reStructuredText."""
    text = re.split(r"(?<=[a-z`)])\. (?=[A-Z`])", text)[0].rstrip(".") + "."
    text = re.sub(r":(?:attr|class|func|math|meth):`+~?([^`]*)`+", r"``\1``", text)
    return re.sub(r"(?<!`)``?([^`]+)``?(?!`)", r"``\1``", text)


def table(value: Any) -> str:
    """The arguments of a class as a Markdown table."""
    parameters = inspect.signature(value).parameters
    rows = ["| argument | default | meaning |", "|---|---|---|"]
    for name, text in arguments(value).items():
        default = parameters[name].default
        shown = "" if default is inspect.Parameter.empty else f"`{default!r}`"
        rows.append(f"| `{name}` | {shown} | {linked(prose(text)) if text else ''} |")
    return (
        f"Arguments of `{value.__name__}`:\n\n" + "\n".join(rows)
        if len(rows) > 2
        else f"`{value.__name__}` takes no arguments."
    )
