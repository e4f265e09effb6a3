"""What kernels compile to, without a GPU: registers, spills and the width of memory accesses, read from the result."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from typing import NamedTuple

from torchcalc.native import gpu

#: Ampere, Hopper, and AMD's MI300.
TARGETS = ("cuda 80", "cuda 90", "hip gfx942")


class Result(NamedTuple):
    backend: str
    registers: int  # of one thread
    spills: int
    wide_loads: int  # of 16 bytes
    wide_stores: int


def compile(kernel: gpu.Kernel, target: str) -> Result:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert gpu.available(), gpu.why_not()
    backend, arch = target.split()
    parameters = inspect.signature(kernel.function.fn).parameters
    signature = {name: p.annotation for name, p in parameters.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(kernel.aligned)}
    result = triton.compile(
        ASTSource(kernel.function, signature, {}, attributes),
        target=GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64),
        options={"num_warps": kernel.warps, **gpu.options(backend)},
    )
    if backend == "hip":
        text = result.asm["amdgcn"]
        (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", text)
        spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)))
        loads, stores = (len(re.findall(rf"global_{what}_dwordx4", text)) for what in ("load", "store"))
        return Result(backend, int(registers), spills, loads, stores)
    text = result.asm["ptx"]
    assert not re.search(r"call\S* .*__nv", text)  # every function of the library is linked in
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{what}:(\d+)", said)[0]) for what in ("REG", "STACK", "LOCAL"))
    spills = stack + local  # of bytes: nothing here has arrays
    wide = r"\S*\.global\S*\.(v4\.b32|v2\.b64)"
    return Result(backend, registers, spills, *(len(re.findall(rf"(?<!\w){x}{wide}", text)) for x in ("ld", "st")))
