"""python -m torchcalc.testing package.module:name [--input 3,4 ...] [--reference package.module:name] [--json]"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchcalc.testing
from torchcalc.testing.registry import CHECKS, Kind
from torchcalc.testing.report import Report


def load(path: str) -> Any:
    """The object that package.module:name (or a longer path after the colon) says.

    Raises:
        ValueError: there is no such module or name.
    """
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{path!r} is not of the form package.module:name")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find {path!r}: {error}") from error
    return found


def example(text: str, seed: int) -> Tensor:
    """A tensor from "3,4" (normal), "3,4:uniform" (between 0 and 1) or "5:classes=3" (int64, 0 to 2).

    Raises:
        ValueError: the text is none of these.

    >>> example("5:classes=3", 0).shape, example("3,4:uniform", 0).shape
    (torch.Size([5]), torch.Size([3, 4]))
    """
    sizes, _, kind = text.partition(":")
    generator = torch.Generator().manual_seed(seed)
    try:
        shape = [int(n) for n in sizes.split(",") if n]
        if kind in ("", "normal"):
            return torch.randn(shape, generator=generator)
        if kind == "uniform":
            return torch.rand(shape, generator=generator)
        name, _, count = kind.partition("=")
        if name == "classes":
            index = torch.arange(math.prod(shape)) % int(count)  # every class, as far as they go
            return index[torch.randperm(len(index), generator=generator)].reshape(shape)
    except ValueError:
        pass
    raise ValueError(f'{text!r} is no input; use "3,4", "3,4:uniform" or "5:classes=3"')


def kind_of(subject: Any) -> Kind:
    if isinstance(subject, type) and issubclass(subject, torch.optim.Optimizer):
        return "optimizer"
    if isinstance(subject, type | nn.Module):
        name = subject.__name__ if isinstance(subject, type) else type(subject).__name__
    else:
        name = getattr(subject, "__name__", "")
    return "loss" if "loss" in name.lower() or "entropy" in name.lower() else "function"


def called(subject: Any) -> Any:
    """What can be called: the apply of a Function class, an instance of a module class."""
    apply = getattr(subject, "apply", None)
    if isinstance(subject, type) and apply is not None and not issubclass(subject, nn.Module):
        return apply
    return subject() if isinstance(subject, type) and issubclass(subject, nn.Module) else subject


def examples(kind: Kind, texts: Sequence[str]) -> list[Tensor]:
    if not texts:
        classes_or_values = ("5,4", "5,4:uniform") if kind == "loss" else ("3,4",)
        texts = classes_or_values
    return [example(text, seed) for seed, text in enumerate(texts)]


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def listing(kind: Kind | None) -> str:
    rows = [c for c in CHECKS.values() if kind in (None, c.kind)]
    return "\n".join(f"{c.kind:10} {c.name:27} {c.doc}{' (with --compile)' if c.slow else ''}" for c in rows)


def check(options: argparse.Namespace) -> Report:
    subject = load(options.subject)
    reference = load(options.reference) if options.reference else None
    kind = options.kind or kind_of(subject)
    include = names(options.include) if options.include else None
    exclude = names(options.exclude) if options.exclude else ()
    if kind == "optimizer":
        return torchcalc.testing.check_optimizer(
            subject, reference, include=include, exclude=exclude, compile=options.compile
        )
    run = torchcalc.testing.check_loss if kind == "loss" else torchcalc.testing.check_function
    return run(
        called(subject), *examples(kind, options.input), reference=called(reference) if reference else None,
        wrt=[int(i) for i in options.wrt.split(",")] if options.wrt else None,
        include=include, exclude=exclude, compile=options.compile, name=options.subject,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0 without errors in the report, 1 with some, 2 where there is nothing to check."""
    parser = argparse.ArgumentParser(
        prog="python -m torchcalc.testing", description="Say whether a function, loss or optimizer is right."
    )
    parser.add_argument("subject", nargs="?", help="package.module:name of a function, Function, module or optimizer")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE[:KIND]",
        help="3,4 or 3,4:uniform or 5:classes=3; once for each argument",
    )
    parser.add_argument("--reference", metavar="MODULE:NAME", help="what to compare with")
    parser.add_argument(
        "--kind", choices=("function", "loss", "optimizer"), help="default: by the subject's type and name"
    )
    parser.add_argument("--wrt", metavar="I,J", help="the inputs to differentiate, by index")
    parser.add_argument("--include", metavar="NAME,...", help="run only these checks")
    parser.add_argument("--exclude", metavar="NAME,...", help="leave these checks out")
    parser.add_argument("--compile", action="store_true", help="run the checks that compile too")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--list", action="store_true", help="list the checks")
    options = parser.parse_args(arguments)
    if options.list:
        print(listing(options.kind))
        return 0
    if options.subject is None:
        parser.error("what is to be checked? package.module:name, or --list")
    sys.path.insert(0, str(Path.cwd()))
    try:
        report = check(options)
    except (ValueError, RuntimeError, TypeError) as error:
        print(f"torchcalc.testing: {error}", file=sys.stderr)
        return 2
    print(report.json() if options.json else report)
    return 0 if report else 1


if __name__ == "__main__":
    sys.exit(main())
