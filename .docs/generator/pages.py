"""One page for each public file: its derivation, figure, what it saves, arguments, ratios, and its code."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import torch

from generator import figures
from generator.docstrings import table
from generator.mathematics import formula, markdown, prose, title
from generator.public import PublicFile, files
from generator.ratios import ratios
from torchcalc import optim
from torchcalc.convergence import stability_limit

__all__ = ["index", "page", "pictures", "without_links"]

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = ("Activations", "Layers", "Losses")

#: The limit as a formula, by the equations of torchcalc/convergence/stability.py, for a sharpness λ.
LIMITS = {
    "GradientDescent": "2/λ",
    "SGD": "2(1 + μ)/((1 − τ)·λ),  with nesterov 2(1 + μ)/((1 + μ + μ(1 − τ))·λ)",
    "Adam": "2(1 + β₁)/((1 − β₁)·λ)",
    "AdamW": "2(1 + β₁)/((1 − β₁)·λ + (1 + β₁)·ω)",
    "NAdam": "2(1 + β₁)/((1 + β₁ − 2μβ₁)·λ + (1 + β₁)·ω)",
    "RMSprop": "2(1 + μ)/λ",
    "Adagrad": "2/λ",
}


def page(file: PublicFile) -> str:
    """The Markdown of a file's page."""
    name, what, rest = title(file.doc)
    parts = [f"# {', '.join(f'`{n}`' for n in file.title)}"]
    parts.append(f"{prose(name)}.  {imported(file.section, bool(file.classes))} The file is `{file.path}`.")
    if "``" in what:
        parts.append(prose(what))
    elif what:
        parts.append(f'<div class="equations" markdown="0"><div><span>{formula(what.rstrip("."))}</span></div></div>')
    parts += pictured(file)
    if rest.strip():
        heading = "Rule" if is_optimizer(file) else "Derivation" if file.section in FUNCTIONS else "About"
        parts.append(f"## {heading}")
        parts.append(markdown(re.sub(r"^Derivation\.\s+", "", rest.strip("\n"), flags=re.MULTILINE)))
    if file.section in FUNCTIONS:
        parts += saved(file)
    if file.section == "Optimizers":
        parts += limit(file)
    parts.append("## Reference")
    for public in file.names:
        parts.append(f"::: {file.module}.{public}" + members(file, public))
        if inspect.isclass(file[public]) and issubclass(file[public], torch.nn.Module):
            parts.append(table(file[public]))
    if file.section in FUNCTIONS:
        parts += twin(file)
    if file.section in FUNCTIONS or is_optimizer(file):
        measured = ratios(list(file.names))
        parts.append("## How fast")
        parts.append(
            f"Rows of benchmarks/README.md, stock time / ours; it says on which machine and when.\n\n{measured}"
            if measured
            else "No ratio is recorded: benchmarks/README.md has no row of it. `python -m benchmarks functions` measures "
            "functions, `python -m benchmarks` the steps of optimizers."
        )
    parts += ["## The file", f'??? note "`{file.path}`"\n\n' + code(file)]
    return "\n\n".join(parts) + "\n"


def is_optimizer(file: PublicFile) -> bool:
    """Whether it has a rule: not what optimizers are written with."""
    return any(issubclass(file[name], optim.Optimizer) and file[name] is not optim.Optimizer for name in file.classes)


def imported(section: str, modules: bool = True) -> str:
    """Where names are imported from."""
    if section in FUNCTIONS:
        return "From `torchcalc.functional`" + (", as modules from `torchcalc.nn`." if modules else ".")
    return f"From `torchcalc.{'optim' if section == 'Optimizers' else section.lower()}`."


def members(file: PublicFile, name: str) -> str:
    """Results show their own methods, everything else only how it is called."""
    value = file[name]
    if inspect.isclass(value) and file.section not in (*FUNCTIONS, "Optimizers", "Instruments"):
        return '\n    options:\n      members: null\n      filters: ["!^_"]'
    return ""


def pictured(file: PublicFile) -> list[str]:
    """The figure, and what it shows."""
    key = "/".join(file.module.split(".")[1:])
    if key in figures.CURVES:
        return [f"![f, its slope and its curvature](../figures/{key.rpartition('/')[2]}.svg)"]
    shown = [name for name in file.classes if name in figures.SETTINGS]
    made = []
    for name in shown:
        settings = ", ".join(f"{key}={value}" for key, value in figures.SETTINGS[name].items())
        steps = len(figures.descend(name)[0]) - 1
        text = f"`{name}({settings})` on the bowl (x² + 20y²)/2, {steps} steps from (-4, 1.5)"
        made += [
            f"![{name} on a quadratic valley](../figures/{name}.svg)",
            text + "; the other hyperparameters by default.",
        ]
    return made


def pictures() -> dict[str, str]:
    """Every figure's place, and its SVG."""
    made = {f"reference/figures/{key.rpartition('/')[2]}.svg": figures.curves(key) for key in figures.CURVES}
    return made | {f"reference/figures/{name}.svg": figures.path(name) for name in figures.SETTINGS}


def saved(file: PublicFile) -> list[str]:
    """What the derivation says that stays alive for backward."""
    doc = file.doc
    if not re.search(r"\b[Ss]aves?\b|\bsaved\b", doc) and "residual_loss" in (ROOT / file.path).read_text():
        doc = importlib.import_module("torchcalc.losses.residual").__doc__ or ""
    found = []
    for paragraph in re.split(r"\n\n", doc):
        text = " ".join(paragraph.split())
        if text.startswith("Saves"):
            found.append(text)
        elif not paragraph.startswith("    "):
            sentences = re.split(r"(?<=[.;:]) (?=[A-Z])|(?<=;) ", text)
            found += [s for s in sentences if re.search(r"(^| )([Ss]aves|Both save)\b|\b(is|are) saved\b", s)]
    return (
        [
            "## What is saved for backward",
            prose(" ".join(s.rstrip(";") + ("." if s.endswith(";") else "") for s in found)),
        ]
        if found
        else []
    )


def twin(file: PublicFile) -> list[str]:
    """What it is compared with, where no difference is named, and by which test."""
    test = f"`tests/{'/'.join(file.module.split('.')[1:-1])}/test_{file.module.rpartition('.')[2]}.py`"
    different = any("Differs from torch" in (file[name].__doc__ or "") for name in file.names)
    stock = sorted({t for name in file.names for t in re.findall(r"as ``(torch\.[\w.]+)``", file[name].__doc__ or "")})
    lines = ["## Compared with torch"]
    if not stock:
        lines.append("torch has none of this name; a float64 formula is what the tests compare with.")
    elif different:
        lines.append(f"Swaps with {', '.join(f'`{t}`' for t in stock)}; what differs stands in a box above.")
    else:
        lines.append(f"Swaps with {', '.join(f'`{t}`' for t in stock)}; beyond rounding no difference is known.")
    lines.append(
        f"{test} holds numerical derivatives of first and second order, forward mode, `vmap`, `torch.func`, "
        "`torch.compile`, autocast, odd layouts and special values, by the checks of `tests/checks.py`."
    )
    return lines


def limit(file: PublicFile) -> list[str]:
    """The largest stable step of each optimizer of a file, as a formula and as a number."""
    parts = []
    for name in file.classes:
        cls = file[name]
        if not (issubclass(cls, optim.Optimizer) and cls is not optim.Optimizer):
            continue
        if name in LIMITS:
            number = stability_limit(cls([torch.nn.Parameter(torch.zeros(1))]), 1.0)
            parts.append(
                f"`{name}` diverges on a quadratic of sharpness λ, the largest eigenvalue of the Hessian (preconditioned, "
                f"where it divides by a preconditioner), beyond\n\n"
                f'<div class="equations" markdown="0"><div><span><i>lr</i> = {formula(LIMITS[name])}</span></div></div>\n\n'
                f"With the default hyperparameters and λ = 1 that is {number:.4g}."
            )
        else:
            parts.append(f"No limit was derived for `{name}`.")
    if set(file.classes) & set(LIMITS):
        parts.append("[The derivation](../convergence/stability.md), [how to measure λ](../../guides/step.md).")
    return ["## Stability limit", *parts] if parts else []


def code(file: PublicFile) -> str:
    """What follows the docstring, as a block within a box."""
    source = (ROOT / file.path).read_text()
    text = re.sub(r'\A""".*?"""\n+', "", source, flags=re.DOTALL).rstrip()
    return "\n".join("    " + line if line else "" for line in ["```python", *text.split("\n"), "```"])


def index() -> str:
    """The first page of the reference: every public name, by section."""
    parts = ["# Reference", "Every public name, and where it is explained."]
    section = ""
    for file in files():
        if file.section != section:
            section = file.section
            parts.append(f"## {section}\n\n{imported(section)}\n\n| name | in one line |\n|---|---|")
        for name in file.names:
            value = file[name]
            first = (inspect.getdoc(value) or "").partition("\n")[0] if callable(value) else "The surfaces, by name."
            line = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", first)
            place = file.uri.removeprefix("reference/")
            parts[-1] += f"\n| [`{name}`]({place}) | {prose(line)} |"
    return "\n\n".join(parts) + "\n"


def without_links(text: str) -> str:
    """A file of the repository as a page: its links lead to files that the site does not have."""
    return re.sub(r"\[([^\]]+)\]\((?!http)[^)]+\)", r"`\1`", text)
