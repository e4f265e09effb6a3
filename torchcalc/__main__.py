"""What runs here, and building the kernels:  python -m torchcalc [--version] [build [--output DIR] [--sanitize]]"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import torch

import torchcalc
from torchcalc import native
from torchcalc.native import build, gpu


def report() -> str:
    """Versions, kernels, instruction set, threads and devices, one per line."""
    if native.available():
        kernels = f"loaded from {native.library()}"
        instructions = torch.ops.torchcalc.instruction_set()
    else:
        kernels = f"not loaded: {native.why_not()}"
        instructions = "none: pure PyTorch"
    devices = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    rows = {
        "torchcalc": torchcalc.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "kernels": kernels,
        "instruction set": instructions,
        "autograd's nodes": "loaded" if native.nodes() else f"not loaded: {native.why_no_nodes()}",
        "on GPUs": gpu.version() if gpu.available() else f"no kernels: {gpu.why_not()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "devices": ", ".join(devices),
    }
    return "\n".join(f"{name:16} {value}" for name, value in rows.items())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m torchcalc", description="Say what runs here, or build the kernels."
    )
    parser.add_argument("--version", action="version", version=f"torchcalc {torchcalc.__version__}")
    commands = parser.add_subparsers(dest="command")
    builder = commands.add_parser("build", help="compile the CPU kernels with the C++ compiler of this machine")
    builder.add_argument(
        "--output", type=Path, help="the directory to build into (default: the package, or your cache)"
    )
    builder.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan; needs --output")
    options = parser.parse_args(arguments)
    if options.command != "build":
        print(report())
        return 0
    if options.sanitize and options.output is None:
        builder.error("--sanitize needs --output: a sanitized library must not take the ordinary one's place")
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            builder.error(f"--output {options.output}: {error.strerror}; give a directory that can be written to")
        if not os.access(options.output, os.W_OK):
            builder.error(f"--output {options.output}: is not writable; give a directory that can be written to")
    start = time.perf_counter()
    try:
        library = build.build(options.output, sanitize=options.sanitize)
    except build.BuildError as error:
        print(f"torchcalc: the kernels were not built: {error}", file=sys.stderr)
        return 1
    print(f"{library} ({library.stat().st_size // 1024} KB, built in {time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
