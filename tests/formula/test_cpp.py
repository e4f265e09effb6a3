"""The loops made from formulas, as the compiler sees them."""

import platform
import re
import subprocess
from pathlib import Path

import pytest

from torchcalc.formula.generate import sources
from torchcalc.native import build, files


def assembly(work: Path) -> str:
    """Of all formulas' loops."""
    command = [
        *build.compiler(),
        *files.FLAGS,
        *files.LOOP_FLAGS,
        "-fno-ipa-icf",
        "-I",
        str(files.SOURCES),
        "-S",
        "-o",
        "-",
    ]
    jobs = []
    for name, text in sources().items():
        if name.startswith("formulas"):
            (work / name).write_text(text, encoding="utf-8")
            jobs.append(subprocess.Popen([*command, str(work / name)], stdout=subprocess.PIPE, text=True))
    return "".join(job.communicate()[0] for job in jobs)


@pytest.mark.slow
def test_every_loop_is_vectorised(tmp_path):
    """One that is not is up to eight times as slow, and nothing else tells."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("reads x86's assembly")
    try:
        understood = build._understands(build.compiler(), files.LOOP_FLAGS, tmp_path)
    except build.BuildError as error:
        pytest.skip(str(error))
    if not understood:
        pytest.skip("this compiler is not GCC, whose vectoriser needs looking after")
    functions = re.findall(
        r"^(\S*(?:block|pairs)_avx2\S*):\n(.*?)^\s*\.size\s+\1", assembly(tmp_path), re.MULTILINE | re.DOTALL
    )
    scalar = [name for name, body in functions if "%ymm" not in body]
    assert len(functions) > 100 and not scalar, scalar
