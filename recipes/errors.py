"""A wrong setting ends in one line that names it; jsonargparse reports it in up to twenty."""

import inspect
import os
import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from traceback import walk_tb
from typing import NoReturn

# Lines that repeat the type annotation or what stands elsewhere in the report.
_NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:|Given value type: |Given value: NestedArg|"
    r"Not a valid subclass of |Subclass types expect |a class path \(str\)|a dict with|"
    r"Expected a path but |Expected a <class 'NoneType'>|Expected a <class 'collections.abc.\w+'>"
)


def fail(message: str) -> NoReturn:
    """End the program as a command line tool does: one line on stderr, exit code 2."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a remedy to append to a message about an unknown ``word``, or nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(option: str, known: Iterable[str]) -> str:
    """Return the message about a misspelt or misplaced option."""
    return f"there is no option {option!r}{did_you_mean(option, known)}"


def one_line(report: str, keys: Iterable[str] = ()) -> str:
    """Condense a report of jsonargparse: where (keys and classes from the outside in), what is wrong, the value.

    Args:
        report: the message that jsonargparse would print.
        keys: the parser's keys, to suggest one for a misspelling.
    """
    where: list[str] = []  # keys and class paths
    what: list[str] = []  # sentences that need no rewording
    expected: list[str] = []
    value = ""
    for line in (line.strip().removeprefix("- ") for line in report.splitlines()):
        if not line or _NOISE.match(line):
            continue
        if m := re.fullmatch(r'Parser key "(.+?)":(?: (.+))?', line):
            where.append(m[1])
            what += [m[2]] if m[2] else []
        elif m := re.fullmatch(r"Problem with given class_path '(.+)':", line):
            where.append(m[1])
        elif m := re.fullmatch(r"Option '(.+)' is not accepted", line):
            what.append(unknown(m[1], _parameters(where[-1])))
            if m[1] == "class_path":
                what[-1] = "beside class_path only init_args is allowed, which holds the arguments"
            break  # the rest repeats it for the other members of a Union
        elif m := re.fullmatch(
            r"(?:unrecognized arguments: -*|Subcommand '\w+' does not accept option ')([^\s=']+).*", line
        ):
            what.append(unknown(m[1], keys))
        elif m := re.fullmatch(r"Expected a (?:<class '(.+?)'>|typing\.Literal\[(.+)\])(?:\. Got value: (.*))?", line):
            expected.append(m[1] or m[2])
            value = value or m[3] or ""
        elif m := re.fullmatch(r"Given value: (.+)", line):
            value = value or m[1]
        elif expected:
            continue
        elif m := re.fullmatch(r"Expected a dot import path string: (.+)", line):
            what.append(f"there is no class {m[1]!r}: give its full path, package.module.Class")
            break
        else:
            what.append(line)
            if line.startswith("Import path "):
                break
    if expected and not what:
        what.append(f"expected {' or '.join(dict.fromkeys(expected))}, got {value!r}")
    return ": ".join(dict.fromkeys(where + what))


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def blame(error: Exception) -> str:
    """Name the class whose constructor refused its arguments, and what it said, in one line."""
    said = str(error) or type(error).__name__
    said = one_line(said) if said.startswith("Does not validate") else " ".join(said.split())
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        cls = type(frame.f_locals.get("self"))
        if frame.f_code.co_name == "__init__" and not cls.__name__.startswith("_"):
            return f"{cls.__module__}.{cls.__qualname__}: {said}"
    return said


def debugging() -> bool:
    """Whether JSONARGPARSE_DEBUG asks for tracebacks instead of one line."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() not in ("", "false", "no", "0")
