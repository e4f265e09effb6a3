"""python -m torchcalc.testing package.module:name [--input 3,4 ...] [--reference package.module:name] [--json]"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import torchcalc.testing
from torchcalc.testing.registry import CHECKS, Kind
from torchcalc.testing.report import Report
from torchcalc.testing.runs import apart


def said(error: BaseException) -> str:
    """The error's kind and message in one line.

    >>> said(SyntaxError("invalid syntax", ("f.py", 1, 7, "def f(:")))
    'SyntaxError: invalid syntax (f.py, line 1)'
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load(path: str) -> Any:
    """The object that package.module:name (or a longer path after the colon) says; it can be called.

    Raises:
        ValueError: there is no such module or name, the module fails at its import, or what it names cannot be called.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{path!r} is not of the form package.module:name")
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does at its import
        raise ValueError(f"cannot import {module!r}: {said(error)}") from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise ValueError(f"cannot find {path!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, which cannot be called")
    return found


def example(text: str, seed: int) -> Tensor:
    """A tensor from "3,4" (normal; "" for a number), "3,4:uniform" (between 0 and 1) or "5:classes=3" (int64, 0 to 2).

    Raises:
        ValueError: the text is none of these.

    >>> example("5:classes=3", 0).shape, example("3,4:uniform", 0).shape
    (torch.Size([5]), torch.Size([3, 4]))
    """
    sizes, _, kind = text.partition(":")
    generator = torch.Generator().manual_seed(seed)
    try:
        shape = [int(n) for n in sizes.split(",")] if sizes else []
        if min(shape, default=0) < 0:
            raise ValueError
        if kind in ("", "normal"):
            return torch.randn(shape, generator=generator, device="cpu")
        if kind == "uniform":
            return torch.rand(shape, generator=generator, device="cpu")
        name, _, count = kind.partition("=")
        if name == "classes" and int(count) > 0:
            index = torch.arange(math.prod(shape), device="cpu") % int(count)  # every class, as far as they go
            return index[torch.randperm(len(index), generator=generator, device="cpu")].reshape(shape)
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


def instance(path: str, subject: Any) -> Any:
    """What takes tensors: the apply of a Function class, an instance of a module class.

    Raises:
        ValueError: the module class needs arguments.
    """
    if not isinstance(subject, type):
        return subject
    if not issubclass(subject, nn.Module):
        return getattr(subject, "apply", subject)
    try:
        return subject()
    except Exception as error:
        raise ValueError(
            f"{path}() raises {said(error)}; make an instance in a module of yours, and name that"
        ) from error


def examples(kind: Kind, texts: Sequence[str]) -> list[Tensor]:
    if not texts:
        classes_or_values = ("5,4", "5,4:uniform") if kind == "loss" else ("3,4",)
        texts = classes_or_values
    return [example(text, seed) for seed, text in enumerate(texts)]


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def indices(text: str) -> list[int]:
    try:
        return [int(i) for i in text.split(",")]
    except ValueError:
        raise ValueError(f'--wrt {text}: give the inputs\' numbers from 0 on, as in "0,2"') from None


def try_it(name: str, subject: Any, inputs: Sequence[Tensor]) -> None:
    """Call it once, with copies: it may write to its inputs, and the checks find that out.

    Raises:
        ValueError: it refuses these inputs, or returns no tensor.
    """
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
    try:
        with torch.random.fork_rng(devices=[]):
            output = subject(*(tensor.clone() for tensor in inputs))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} raises on inputs of shape {shapes}: {said(error)}; give others by --input") from error
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
        raise ValueError(f"{name} returns no tensor but {type(output).__name__}: there is nothing to differentiate")


def listing(kind: Kind | None) -> str:
    rows = [c for c in CHECKS.values() if kind in (None, c.kind)]
    return "\n".join(f"{c.kind:10} {c.name:27} {c.doc}{' (with --compile)' if c.slow else ''}" for c in rows)


def check(options: argparse.Namespace) -> Report:
    subject = load(options.subject)
    reference = load(options.reference) if options.reference else None
    kind = options.kind or kind_of(subject)
    how: dict[str, Any] = dict(seconds=options.seconds, isolate=options.isolate and not torch.cuda.is_initialized())
    include = names(options.include) if options.include else None
    exclude = names(options.exclude) if options.exclude else ()
    if kind == "optimizer":
        return torchcalc.testing.check_optimizer(
            subject, reference, include=include, exclude=exclude, compile=options.compile, **how
        )
    subject, inputs = instance(options.subject, subject), examples(kind, options.input)
    if reference is not None:
        reference = instance(options.reference, reference)
    for path, fn in ((options.subject, subject), (options.reference, reference)):
        if fn is not None:
            apart(try_it, path, fn, inputs) if how["isolate"] else try_it(path, fn, inputs)
    run = torchcalc.testing.check_loss if kind == "loss" else torchcalc.testing.check_function
    return run(
        subject, *inputs, reference=reference, wrt=indices(options.wrt) if options.wrt else None,
        include=include, exclude=exclude, compile=options.compile, name=options.subject, **how,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0 without errors in the report, 1 with some, 2 where it could not check."""
    parser = argparse.ArgumentParser(
        prog="python -m torchcalc.testing",
        description="Say whether a function, loss or optimizer is right.",
        epilog="Exit status: 0 if it is, 1 if the report has errors, 2 if nothing could be checked.",
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
    parser.add_argument("--seconds", type=float, metavar="N", help="the time budget; the rest is not checked")
    parser.add_argument(
        "--isolate", action=argparse.BooleanOptionalAction, default="fork" in multiprocessing.get_all_start_methods(),
        help="run in a process of its own, so that what aborts is a finding",
    )  # fmt: skip
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
    except (Exception, SystemExit) as error:  # 1 would say that the subject is wrong
        text = " ".join(str(error).split()) if isinstance(error, ValueError) else said(error)
        print(f"torchcalc.testing: {text}", file=sys.stderr)
        return 2
    print(report.json() if options.json else report)
    return 0 if report else 1


if __name__ == "__main__":
    sys.exit(main())
