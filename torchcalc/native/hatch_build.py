"""Builds the kernels while hatchling builds a wheel or an editable install, if torch and a C++ compiler are there.

With them the wheel holds the libraries and is tagged py3-none-<platform>; without either it is pure Python, and
`python -m torchcalc build` compiles later.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):
    """Named in pyproject.toml under [tool.hatch.build.targets.wheel.hooks.custom]."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files; `version` is "standard" or "editable"."""
        # By path: importing torchcalc would import torch, and an editable install is not importable yet.
        spec = importlib.util.spec_from_file_location("build", Path(self.root, "torchcalc", "native", "build.py"))
        assert spec is not None and spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        warn = self.app.display_warning
        try:
            library = native.build(native.PACKAGE, again=False, warn=warn)
        except native.BuildError as error:
            warn(f"torchcalc is installed without its CPU kernels: {error}")
            return
        # An editable install finds the libraries in the source tree, where they were built.
        if version != "editable":
            names = [library.name, native.nodes_name(native.torch_version(native.torch_directory()))]
            # .gitignore would leave them out
            build_data["artifacts"] += [f"torchcalc/native/{name}{end}" for name in names for end in ("", ".sha256")]
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + re.sub(r"[-.]", "_", sysconfig.get_platform())
