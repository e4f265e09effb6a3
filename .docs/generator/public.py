"""What is public, and in which file it is: the pages of the reference."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

__all__ = ["NAMESPACES", "ROLE", "PublicFile", "files", "home", "link", "targets"]

#: A reference in a docstring: what kind, and where to.
ROLE = re.compile(r":(func|class|meth|mod|attr):`~?([^`]+)`")

NAMESPACES = (
    "functional",
    "nn",
    "optim",
    "calculus",
    "convergence",
    "instruments",
    "testing",
    "resume",
    "distributed",
    "autograd",
)

#: Sections of the reference, by the folder of the file.
SECTIONS = {
    "activations": "Activations",
    "layers": "Layers",
    "losses": "Losses",
    "optim": "Optimizers",
    "calculus": "Calculus",
    "convergence": "Convergence",
    "instruments": "Instruments",
    "testing": "Testing",
    "resume": "Resume",
    "distributed": "Distributed",
    "autograd": "Autograd",
}


@dataclass(frozen=True)
class PublicFile:
    """A file of the package that defines public names."""

    module: str  #: torchcalc.activations.tanh
    names: tuple[str, ...]  #: tanh, Tanh: functions first
    doc: str  #: of the file

    @property
    def section(self) -> str:
        return SECTIONS[self.module.split(".")[1]]

    @property
    def uri(self) -> str:
        """Of its page: reference/activations/tanh.md."""
        return "reference/" + "/".join(self.module.split(".")[1:]) + ".md"

    @property
    def path(self) -> str:
        """In the repository: torchcalc/activations/tanh.py."""
        source = inspect.getsourcefile(importlib.import_module(self.module)) or ""
        path = self.module.replace(".", "/")
        return f"{path}/__init__.py" if source.endswith("__init__.py") else f"{path}.py"

    @property
    def functions(self) -> list[str]:
        return [name for name in self.names if not inspect.isclass(self[name])]

    @property
    def title(self) -> list[str]:
        """What the page is called: a module goes without saying beside its function."""
        return self.functions if self.module.split(".")[1] in ("activations", "layers", "losses") else list(self.names)

    @property
    def classes(self) -> list[str]:
        return [name for name in self.names if inspect.isclass(self[name])]

    def __getitem__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.module), name)


def home(namespace: ModuleType, name: str) -> str:
    """The module that defines a public name; for data, that of its class."""
    value = getattr(namespace, name)
    return getattr(value, "__module__", None) or type(next(iter(value.values()))).__module__


@cache
def files() -> tuple[PublicFile, ...]:
    """Every file that defines something public, in the order of the sections."""
    found: dict[str, list[str]] = {}
    for short in NAMESPACES:
        namespace = importlib.import_module(f"torchcalc.{short}")
        for name in namespace.__all__:
            names = found.setdefault(home(namespace, name), [])
            names += [] if name in names else [name]
    order = list(SECTIONS)
    made = []
    for module in sorted(found, key=lambda module: (order.index(module.split(".")[1]), module)):
        here = importlib.import_module(module)
        names = sorted(found[module], key=lambda name: (inspect.isclass(getattr(here, name)), name.lower()))
        made.append(PublicFile(module, tuple(names), inspect.getdoc(here) or ""))
    return tuple(made)


@cache
def targets() -> dict[str, str]:
    """Where a docstring's reference leads: the name, short or dotted, to its full path."""
    found = {}
    for file in files():
        for name in file.names:
            full = f"{file.module}.{name}"
            found[name] = found[full] = full
    for short in NAMESPACES:
        for name in importlib.import_module(f"torchcalc.{short}").__all__:
            found[f"torchcalc.{short}.{name}"] = found[name]
    return found


def link(role: re.Match[str]) -> str:
    """A docstring's reference as Markdown: to the page, if what it names is public, else the name."""
    short = role[2].rpartition(".")[2]
    where = targets().get(role[2]) if role[1] in ("func", "class") else None
    return f"[`{short}`][{where}]" if where else f"`{role[2] if role[1] == 'mod' else short}`"
