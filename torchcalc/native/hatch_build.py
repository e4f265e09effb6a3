"""Builds the kernels while hatchling builds a wheel or an editable install, if torch and a C++ compiler are there.

With them the wheel holds the libraries and is tagged py3-none-<platform>; without either it is pure Python, and
`python -m torchcalc build` compiles later.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _builder(package: Path) -> tuple[Any, Any]:
    """torchcalc.native's build and files, without torchcalc itself: that would import torch, which pip hides here."""
    for name, directory in (("torchcalc", package), ("torchcalc.native", package / "native")):
        hollow = ModuleType(name)
        hollow.__path__ = [str(directory)]
        sys.modules[name] = hollow
    try:
        return import_module("torchcalc.native.build"), import_module("torchcalc.native.files")
    finally:  # whoever imports torchcalc after us gets all of it
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchcalc"]:
            del sys.modules[name]


def platform_tag(platform: str, libraries: list[Path]) -> str:
    """The wheel's platform; of Linux manylinux_2_N, where N is the newest glibc that a library has symbols of (PEP 600)."""
    platform = re.sub(r"[-.]", "_", platform)
    symbols = [n for path in libraries if path.is_file() for n in re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())]
    return re.sub("^linux", f"manylinux_2_{max(map(int, symbols))}", platform) if symbols else platform


class NativeBuildHook(BuildHookInterface):
    """Named in pyproject.toml under [tool.hatch.build.targets.wheel.hooks.custom]."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files; `version` is "standard" or "editable"."""
        build, files = _builder(Path(self.root, "torchcalc"))
        warn = self.app.display_warning
        try:
            library = build.build(files.PACKAGE, again=False, warn=warn)
        except build.BuildError as error:
            warn(f"torchcalc is installed without its CPU kernels: {error}")
            return
        # An editable install finds the libraries in the source tree, where they were built.
        if version != "editable":
            names = [library.name, files.nodes_name(build.torch_version(build.torch_directory()))]
            # .gitignore would leave them out
            build_data["artifacts"] += [f"torchcalc/native/{name}{end}" for name in names for end in ("", ".sha256")]
            build_data["pure_python"] = False
            directory = Path(self.root, "torchcalc", "native")
            build_data["tag"] = (
                f"py3-none-{platform_tag(sysconfig.get_platform(), [directory / name for name in names])}"
            )
