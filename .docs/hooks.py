"""mkdocs' hook: adds the reference to the site, and lists it in the navigation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # mkdocs loads hooks by their path

from generator import pages, public  # noqa: E402

GUIDES = [
    "story", "swap", "choose", "function", "step", "dashboard", "diverged", "cuda", "many", "from_torch", "from_liger",
    "from_pytorch_optimizer",
]  # fmt: skip


def on_config(config: MkDocsConfig) -> None:
    """The navigation: what was written, then what is made."""
    reference: dict[str, list[Any]] = {}
    for file in public.files():
        title = ", ".join(file.title)
        reference.setdefault(file.section, []).append({title: file.uri})
    config.nav = [
        {"torchcalc": "index.md"},
        {"Install": "install.md"},
        {"Guides": [f"guides/{name}.md" for name in GUIDES]},
        {"Reference": ["reference/index.md", *({section: each} for section, each in reference.items())]},
        {"Compatibility": "compatibility.md"},
        {"Helpers": "helpers.md"},
        {"Changes": "changes.md"},
        {"Contributing": "contributing.md"},
        {"Cite": "cite.md"},
    ]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages and figures that are made."""
    made = {file.uri: pages.page(file) for file in public.files()} | pages.pictures()
    made["reference/index.md"] = pages.index()
    made["changes.md"] = (HERE.parent / "CHANGELOG.md").read_text()
    made["contributing.md"] = pages.without_links((HERE.parent / "CONTRIBUTING.md").read_text())
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files
