"""Runs the kernel tests on kernels built with AddressSanitizer and UBSan:  python -m tests.native.sanitized [pytest arguments]

Python itself is not built with the sanitizers, so their runtime is preloaded; it sees the accesses of our library, and the
heap of the whole process. Leaks are not looked for: Python and torch never free much of what they own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from torchcalc.native import build, files

HERE = Path(__file__).parent
TESTS = [
    *(
        "test_optim.py",
        "test_refusals.py",
        "test_bound.py",
        "test_rounding.py",
        "test_grad_norm.py",
        "test_rows.py",
        "test_norms.py",
    ),
    "../formula/test_pointwise.py",
    "../layers/test_dropout.py",
    "../layers/test_mlp.py::test_every_activation",
    "../layers/test_mlp.py::test_rounding",
]


def library_of_compiler(*names: str) -> str:
    """Where the compiler has the first of these shared libraries."""
    for name in names:
        command = [*build.compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if os.path.isabs(path):
            return os.path.realpath(path)
    raise SystemExit(f"{build.compiler()[0]} has no {names[0]}; install it, or set CXX=g++")


def runtime() -> str:
    """AddressSanitizer's runtime, and the C++ library that it intercepts exceptions in: python itself links neither."""
    sanitizer = library_of_compiler("libasan.so", f"libclang_rt.asan-{os.uname().machine}.so")
    return f"{sanitizer} {library_of_compiler('libstdc++.so')}"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="torchcalc-sanitized-") as directory:
        library = build.build(Path(directory), sanitize=True)
        assert b"__asan_init" in library.read_bytes()
        for nodes in files.PACKAGE.glob(
            f"{files.nodes_name(torch.__version__)}*"
        ):  # which call the kernels; with its hash
            shutil.copy2(nodes, directory)
        log = Path(directory, "report")  # pytest captures stderr, which dies with the process
        environment = {
            **os.environ,
            "LD_PRELOAD": runtime(),
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={log}",
            "TORCHCALC_NATIVE_LIBRARY": str(library),
        }
        tests = [str(HERE / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, *arguments]
        status = subprocess.run(command, env=environment, cwd=HERE.parents[1]).returncode
        for report in Path(directory).glob("report*"):
            print(report.read_text())
            status = status or 1
        return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
