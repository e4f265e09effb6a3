"""A wrong setting ends in one line that names it; jsonargparse reports it in up to twenty."""

import inspect
import os
import re
import sys
from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException

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


def closest(word: str, known: Iterable[str]) -> str | None:
    """What was probably meant: its end, its abbreviation, a part of it, or at least six tenths of the letters are the same.

    >>> closest("learning_rate", ["weight_decay", "lr"])
    'lr'
    >>> closest("--epochs", ["trainer.max_steps", "trainer.max_epochs"])
    'trainer.max_epochs'
    """

    def likeness(each: str) -> tuple[float, float]:
        tail, other = word.rpartition(".")[2], each.rpartition(".")[2]
        whole = SequenceMatcher(None, word, each).ratio()
        if tail == other:
            return 3.0, whole
        if tail and (tail == initials(other) or other == initials(tail)):
            return 2.0, whole
        if tail in other.split("_"):
            return 1.0, whole
        return max(whole, SequenceMatcher(None, tail, other).ratio()), whole

    word = word.lstrip("-")
    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def initials(word: str) -> str:
    """The abbreviation of a word of several parts; of one part it has none.

    >>> initials("learning_rate"), initials("rate")
    ('lr', '')
    """
    parts = [part for part in word.split("_") if part]
    return "".join(part[0] for part in parts) if len(parts) > 1 else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a remedy to append to a message about an unknown ``word``, or nothing."""
    meant = closest(word, known)
    return f"; did you mean {meant!r}?" if meant else ""


def unknown(option: str, known: Iterable[str]) -> str:
    """Return the message about a misspelt or misplaced option."""
    return f"there is no option {option!r}{did_you_mean(option, known)}"


def unrecognized(argument: str, keys: Iterable[str], commands: Collection[str] = ()) -> str:
    """Return the message about an argument that is neither a command nor a setting.

    Args:
        argument: as it was typed.
        keys: the settings.
        commands: words that may come first.
    """
    word, keys = argument.partition("=")[0], list(keys)
    if argument.startswith("-"):
        return unknown(word.lstrip("-"), keys)
    if word in commands:
        return f"{word!r} is a command, and comes before the settings"
    if word in keys:
        return f"a setting begins with two dashes: --{argument}"
    if "." not in word and "=" not in argument:
        meant = closest(word, commands)
        remedy = f"did you mean {meant!r}? " if meant else ""
        return f"there is no command {word!r}; {remedy}commands are: {', '.join(commands)}"
    meant = closest(word, keys)
    return f"there is no option {word!r}" + (f"; did you mean '--{meant}'?" if meant else "")


def one_line(report: str, keys: Iterable[str] = (), commands: Collection[str] = ()) -> str:
    """Condense a report of jsonargparse: where (keys and classes from the outside in), what is wrong, the value.

    Args:
        report: the message that jsonargparse would print.
        keys: the parser's keys, to suggest one for a misspelling.
        commands: words that may come before the settings.
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
        elif m := re.fullmatch(r"unrecognized arguments: (\S+).*", line):
            what.append(unrecognized(m[1], keys, commands))
        elif m := re.fullmatch(r"argument --(\S+): expected one argument", line):
            what.append(f"{m[1]}: its value is missing, as in --setting=value")
        elif m := re.fullmatch(r"Subcommand '\w+' does not accept option '([^']+)'.*", line):
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


def explain(error: Exception) -> str | None:
    """What went wrong, in one line, where the cause lies in the settings, the disk or the checkpoint; else None."""
    said = " ".join(str(error).split())
    if isinstance(error, MisconfigurationException):  # of the trainer or a callback, before training
        return said
    if isinstance(error, OSError) and error.errno is not None:
        path = error.filename2 or error.filename
        where = f": {str(path)!r}" if path else ""
        return f"{error.strerror}{where}; if it is of the runs' folder, --trainer.logger.save_dir=DIR names another"
    frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    if any("checkpoint_connector" in code.co_filename and "restore" in code.co_name for code in frames):
        return f"ckpt_path: {type(error).__name__}: {said}"
    return None


def binary(arguments: Iterable[str]) -> str:
    """Name the argument whose file is no text."""
    for argument in arguments:
        try:
            Path(argument.rpartition("=")[2]).read_text()
        except OSError:
            continue  # no file
        except UnicodeDecodeError:
            return argument.lstrip("-")
    return "a file"


def debugging() -> bool:
    """Whether JSONARGPARSE_DEBUG asks for tracebacks instead of one line."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() not in ("", "false", "no", "0")
