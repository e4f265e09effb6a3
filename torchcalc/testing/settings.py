"""The settings and generators of the whole process: as they are, and set back."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def autocast_dtype(value: torch.dtype) -> None:
    torch.set_autocast_dtype("cpu", value)


def backend(owner: Any, name: str) -> Setting:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


PATCHABLE = [
    (owner, name)
    for owner in (torch, torch.nn.functional)
    for name, f in list(vars(owner).items())
    if inspect.isroutine(f) and not name.startswith("_")
]
TINY: torch.Tensor = torch.full((), 1e-310, dtype=torch.float64, device="cpu")
SETTINGS: dict[str, Setting] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, lambda value: set_default_device(value)),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "inference mode": (torch.is_inference_mode_enabled, lambda value: None),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch._C._set_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "anomaly detection": (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.autograd.set_detect_anomaly(*value) and None,
    ),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "autocast": (lambda: torch.is_autocast_enabled("cpu"), lambda value: torch.set_autocast_enabled("cpu", value)),
    "the dtype of autocast": (lambda: torch.get_autocast_dtype("cpu"), autocast_dtype),
    "the cache of autocast": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "the precision of float32 matmul": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "multithreading of backward": (
        torch.autograd.is_multithreading_enabled,
        lambda value: torch.autograd.set_multithreading_enabled(value) and None,
    ),
    "torch.backends.mkldnn.enabled": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    "torch.backends.cudnn.benchmark": backend(torch.backends.cudnn, "benchmark"),
    "torch.backends.cudnn.deterministic": backend(torch.backends.cudnn, "deterministic"),
    "torch.backends.cudnn.allow_tf32": backend(torch.backends.cudnn, "allow_tf32"),
    "the garbage collector": (gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
    "hooks of all modules": (lambda: module_hooks(), lambda value: set_module_hooks(value)),
    "functions of torch": (
        lambda: [getattr(owner, name, None) for owner, name in PATCHABLE],
        lambda value: patch(value),
    ),
    "the options of printing": (
        lambda: dict(vars(torch._tensor_str.PRINT_OPTS)),
        lambda value: vars(torch._tensor_str.PRINT_OPTS).update(value),
    ),
    "the function modes": (torch._C._len_torch_function_stack, lambda value: pop_modes(value)),
    "the hooks of saved tensors": (lambda: saved_hooks(), lambda value: set_saved_hooks(value)),
    "the flushing of denormal numbers": (lambda: not float(TINY * 1), torch.set_flush_denormal),
    "the environment": (lambda: environment(), lambda value: set_environment(value)),
    "the filters of warnings": (lambda: list(warnings.filters), lambda value: set_filters(value)),
    "the level of logging": (
        lambda: (logging.root.level, logging.root.manager.disable),
        lambda value: set_level(value),
    ),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "the working directory": (os.getcwd, os.chdir),
}
LATE = (
    "TORCH",
    "_TORCH",
    "TRITON",
    "KMP_",
    "KINETO",
    "CUDA_MODULE_LOADING",
    "PYTEST_",
)  # what torch itself writes, when first needed


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(LATE)}


def set_environment(value: dict[str, str]) -> None:
    for name in environment():
        if name not in value:
            del os.environ[name]
    os.environ.update(value)


def set_filters(value: list[Any]) -> None:
    warnings.filters[:] = value  # type: ignore[index]
    with warnings.catch_warnings():  # its end tells Python that they have changed
        pass


def set_level(value: tuple[int, int]) -> None:
    logging.root.setLevel(value[0])
    logging.disable(value[1])


def set_default_device(value: torch.device) -> None:
    """The default device as it was, be it set for good or by ``with``: under a ``with`` nothing of ours may stay.

    ``set_default_device`` remembers the mode that it finds. One that outlives the ``with`` would bring it back later.
    """
    torch.set_default_device(None)
    if torch.get_default_device() != value:
        torch.set_default_device(value)


def patch(value: list[Any]) -> None:
    for (owner, name), f in zip(PATCHABLE, value, strict=True):
        setattr(owner, name, f)


def module_hooks() -> dict[str, dict[Any, Any]]:
    return {
        name: dict(hooks)
        for name, hooks in vars(nn.modules.module).items()
        if name.startswith("_global_") and isinstance(hooks, dict)
    }


def set_module_hooks(value: dict[str, dict[Any, Any]]) -> None:
    for name, hooks in value.items():
        there = getattr(nn.modules.module, name)
        there.clear()
        there.update(hooks)


def pop_modes(count: int) -> None:
    while torch._C._len_torch_function_stack() > count:
        torch._C._pop_torch_function_stack()


def saved_hooks() -> Any:
    """The default hooks of saved tensors, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def set_saved_hooks(value: Any) -> None:
    while saved_hooks() not in (None, value):
        torch._C._autograd._pop_saved_tensors_default_hooks()


def settings() -> dict[str, Any]:
    """The global settings as they are, NumPy's among them where it is in use."""
    found = {name: get() for name, (get, _) in SETTINGS.items()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found["NumPy's error handling"] = numpy.geterr()
    return found


def restore(before: dict[str, Any]) -> list[str]:
    """Set back what has changed, and say what has."""
    changed = [name for name, value in settings().items() if name in before and value != before[name]]
    for name in changed:
        if name in SETTINGS:
            SETTINGS[name][1](before[name])
        else:
            sys.modules["numpy"].seterr(**before[name])
    return changed


def generators() -> dict[str, Any]:
    """The states of the global generators."""
    found: dict[str, Any] = {"torch's": torch.default_generator.get_state(), "Python's": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *others = numpy.random.get_state()
        found["NumPy's"] = (kind, keys.tolist(), *others)
    return found


def alike(a: Any, b: Any) -> bool:
    """Whether two states of a generator are the same."""
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def seed(value: int) -> None:
    torch.default_generator.manual_seed(value)
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value)


def regenerate(states: dict[str, Any]) -> None:
    torch.default_generator.set_state(states["torch's"])
    random.setstate(states["Python's"])
    if "NumPy's" in states:
        kind, keys, *others = states["NumPy's"]
        numpy = sys.modules["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *others))


@contextmanager
def left_alone() -> Iterator[None]:
    """Afterwards Python's and NumPy's generators and all settings are as they were."""
    states, before = generators(), settings()
    try:
        yield
    finally:
        regenerate(states)
        restore(before)
