"""Kernels for GPUs: Triton, found once and at first use; and a launch that costs no more than an operation of torch.

A kernel here is text, since it is made of a formula. All its choices are in the text: it has no ``constexpr`` arguments, and
every argument has its type in the signature. So its compiled form is one, and :meth:`Kernel.launch` may call that directly
(6 µs; 3 µs from C++), which ``kernel[grid](...)`` first has to find (13 µs).

With TRITON_INTERPRET=1 in the environment, kernels run on CPU tensors, to test their meaning without a GPU.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "Kernel",
    "available",
    "capturing",
    "is_dense",
    "options",
    "stream",
    "takes",
    "version",
    "why_not",
]

#: Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_OLDEST = (3, 4)

_triton: Any = None
_why_not: str | None = None  # None: nobody has looked yet
_direct = False  # whether Triton launches a compiled kernel as _Compiled does
_numbers = itertools.count()
_nodes: Any = None
_CODES = {"i64": "q", "i32": "i", "fp64": "d", "fp32": "f"}


def available() -> bool:
    """Whether Triton is there; the first call looks for it. On which device it can run, :func:`takes` says."""
    if _why_not is None:
        _find()
    return not _why_not


def why_not() -> str:
    """Why there are no kernels for GPUs, and what to do about it; empty if there are."""
    available()
    return _why_not or ""


def version() -> str:
    """What compiles the kernels."""
    return f"Triton {_triton.__version__}" if available() else ""


def takes(device: torch.device) -> bool:
    """Whether kernels run on the device."""
    if device.type == "cuda":
        return not INTERPRETED and available() and _is_new_enough(device.index)
    return INTERPRETED and device.type == "cpu" and available()


def _find() -> None:
    global _triton, _why_not, _direct
    if os.environ.get("TORCHCALC_TRITON") == "0":
        _why_not = "switched off by TORCHCALC_TRITON=0 in the environment. Unset it to use the kernels."
        return
    try:
        import triton
        import triton.language
        from triton.runtime.jit import JITFunction

        version = tuple(int(x) for x in triton.__version__.split("+")[0].split(".")[:2])
    except Exception as error:  # absent, or broken in one of the many ways of compiled packages
        _why_not = (
            f"Triton cannot be imported ({type(error).__name__}: {error}). torch's wheels for CUDA bring it along."
        )
        return
    if version < _OLDEST:
        _why_not = f"Triton {triton.__version__} is older than {'.'.join(map(str, _OLDEST))}, which these kernels need."
        return
    _triton, _why_not = triton, ""
    # What Triton does not promise is relied on only where its own launch reads like ours.
    run = "".join(inspect.getsource(JITFunction.run).split())
    _direct = (
        "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
        "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
    ) in run


_capable: dict[int, bool] = {}


def _is_new_enough(index: int) -> bool:
    if index not in _capable:
        _capable[index] = torch.cuda.is_available() and (  # fake tensors are on devices that are not there
            torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (7, 0)
        )
    return _capable[index]


def options(backend: str) -> dict[str, Any]:
    """Options of compilation for "cuda" or "hip".

    Products and sums are fused only where a formula says so, and the mathematical functions keep subnormal numbers: both as in
    torch's own kernels for the CPU.
    """
    return {"enable_fp_fusion": False, **({"enable_reflect_ftz": False} if backend == "cuda" else {})}


def is_dense(x: Tensor) -> bool:
    """Whether its elements fill a stretch of memory, each place once."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def stream(device: torch.device) -> int:
    """The current stream of the device, as a number."""
    if device.type != "cuda":
        return 0
    number: int = torch._C._cuda_getCurrentRawStream(device.index)
    return number


def capturing(device: torch.device | None = None) -> bool:
    """Whether a CUDA graph is being captured, by the current stream."""
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


class Kernel:
    """A kernel, compiled for a device at its first launch there.

    Args:
        name: of the function in the text.
        text: its source, a function of typed arguments: tensors (``x: "*fp32"``) first, then numbers (``n: "i64"``). It
            may use ``tl``, which is triton.language, and ``libdevice``, the platform's mathematical functions.
        tensors: how many arguments are tensors.
        aligned: of those the first so many begin at multiples of 16 bytes.
        warps: of 32 threads each, for one program.
    """

    def __init__(self, name: str, text: str, tensors: int, *, aligned: int = 0, warps: int = 4) -> None:
        self.name, self.text, self.tensors, self.aligned, self.warps = name, text, tensors, aligned, warps
        self._function: Any = None
        self._compiled: dict[int, Any] = {}
        self._kernels: dict[int, Any] = {}
        self._launchable: dict[int, Any] = {}  # for the nodes' launch, where it can be used

    def handle(self, device: torch.device) -> tuple[int, int, int] | None:
        """What CUDA's driver launches: the function, the threads of a program, its shared memory.

        None before the first launch, and where a launch needs more than this.
        """
        kernel = self._kernels.get(device.index)
        if kernel is None or torch.version.cuda is None:
            return None
        about = kernel.metadata
        special = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
        if any(getattr(about, name, 0) for name in special) or tuple(getattr(about, "cluster_dims", ())) not in (
            (),
            (1, 1, 1),
        ):
            return None
        return kernel.function, 32 * about.num_warps, about.shared

    @property
    def function(self) -> Any:
        """The text as Triton's function."""
        if self._function is None:
            available()  # that finds Triton
            file = f"<torchcalc kernel {next(_numbers)}: {self.name}>"
            linecache.cache[file] = (len(self.text), None, self.text.splitlines(keepends=True), file)  # Triton reads it
            names: dict[str, Any] = {"tl": _triton.language, "libdevice": _libdevice()}
            exec(compile(self.text, file, "exec", dont_inherit=True), names)  # annotations are values here
            function = names[self.name]
            fixed = list(inspect.signature(function).parameters)[self.aligned :]
            self._function = _triton.jit(function, do_not_specialize=fixed)
        return self._function

    def launch(
        self, device: torch.device, programs: int, tensors: list[Tensor], numbers: tuple[float, ...] = ()
    ) -> None:
        """Run it on the device's current stream."""
        compiled = self._compiled.get(device.index)
        if compiled is None:
            return self._first_launch(device, programs, tensors, numbers)
        hooks = _triton.knobs.runtime
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        seen = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)  # a profiler wants to see the launch
        launchable = None if seen else self._launchable.get(device.index)
        if launchable is not None and _nodes.launch(launchable, device.index, programs, tensors, numbers):
            return
        if seen or device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device.index):
                return self._launch_slowly(device, programs, tensors, numbers)
        run, function, metadata = compiled
        run(
            programs, 1, 1, torch._C._cuda_getCurrentRawStream(device.index), function, metadata, None, None, None,
            *[t.data_ptr() for t in tensors], *numbers,
        )  # fmt: skip

    def _first_launch(
        self, device: torch.device, programs: int, tensors: Sequence[Tensor], numbers: Sequence[float]
    ) -> None:
        if device.type != "cuda":
            function = self.function
            function[(programs,)](*tensors, *map(_interpreted_number, numbers, self.types()))
            return
        with torch.cuda.device(device.index):
            kernel = self._launch_slowly(device, programs, tensors, numbers)
        try:
            if _direct:
                self._compiled[device.index] = kernel.run, kernel.function, kernel.packed_metadata
                self._kernels[device.index] = kernel
                self._find_launchable(device)
        except AttributeError:  # launched by kernel[grid] for ever, then
            pass

    def _find_launchable(self, device: torch.device) -> None:
        """Where the nodes are built, they launch what the driver takes as it is: in 3 µs, where Triton's launch takes 6."""
        global _nodes
        from torchcalc.native import pointwise

        _nodes = pointwise.rows()
        if _nodes is not None and (handle := self.handle(device)) is not None:
            types = "".join(_CODES[t] for t in self.types())
            self._launchable[device.index] = _nodes.launchable(*handle, types)

    def types(self) -> list[str]:
        """Those of its numbers."""
        return list(inspect.get_annotations(self.function.fn).values())[self.tensors :]

    def _launch_slowly(
        self, device: torch.device, programs: int, tensors: Sequence[Tensor], numbers: Sequence[float]
    ) -> Any:
        backend = "cuda" if torch.version.hip is None else "hip"
        return self.function[(programs,)](*tensors, *numbers, num_warps=self.warps, **options(backend))


def _libdevice() -> Any:
    """exp, tanh, erfc, ...: the platform's library, the one which torch's own kernels use; torch itself when interpreted."""
    if INTERPRETED:
        return _Interpreted()
    from triton.language.extra import libdevice

    return libdevice


def _interpreted_number(x: float, type_: str) -> Any:
    """A number of its type; by itself the interpreter would guess one."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    name = type_.replace("fp", "float").replace("i", "int")  # in torch and Triton
    value = torch.tensor([x], dtype=getattr(torch, name), device="cpu").numpy()
    return tl.core.tensor(TensorHandle(value, getattr(tl, name)), getattr(tl, name))


class _Interpreted:
    """Mathematical functions on the interpreter's arrays."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        def function(*args: Any) -> Any:
            whole = max(args, key=lambda x: x.handle.data.size)  # the others are broadcast
            result = getattr(torch, name)(*[torch.from_numpy(x.handle.data) for x in args])
            return tl.core.tensor(TensorHandle(result.numpy(), whole.handle.dtype), whole.type)

        return function
