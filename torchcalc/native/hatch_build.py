"""Builds the kernels while hatchling builds a wheel or an editable install, if torch and a C++ compiler are there.

With them (`pip install --no-build-isolation .`) the wheel holds the library and is tagged py3-none-<platform>; without
either it is pure Python, and `python -m torchcalc build` compiles later.
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
        library = native.PACKAGE / native.library_name()
        try:
            if (
                not library.exists()
            ):  # it is named by its sources, and serves every torch: an environment more is no reason
                native.build(native.PACKAGE)
        except native.BuildError as error:
            self.app.display_warning(f"torchcalc is installed without its CPU kernels: {error}")
            return
        # An editable install finds the library in the source tree, where it was built.
        if version != "editable":
            build_data["artifacts"].append(str(library.relative_to(self.root)))  # .gitignore would leave it out
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + re.sub(r"[-.]", "_", sysconfig.get_platform())
