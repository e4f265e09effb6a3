"""The kernels of a step on a GPU, as text: an update rule over all tensors of a table, the norm of their gradients, and
what a step needs to know of both before it can begin.

A *table* in device memory has a row for each tensor: the addresses of p and its slots, and its length. The addresses of the
gradients, which change more often, stand apart. A program takes one block of one tensor: ``tensors[k]`` says which
tensor, ``blocks[k]`` which block of it. So one launch steps any number of tensors.

What is the same for a whole tensor (1 − β₁ᵗ) comes as arguments, computed on the host, where the host knows t and lr. Where
they are on the device (capturable, fused, lr as a tensor) a small kernel computes it there first, a row for each tensor. The clip
coefficient and whether to skip the step come from :func:`finish`. So nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from torchcalc.formula.code import assignments
from torchcalc.formula.numbers import host_function
from torchcalc.formula.rule import Recording
from torchcalc.formula.triton import ELEMENTS, LANGUAGES, TYPES, Block, argument, compute_type, numbers_of, signature
from torchcalc.native.gpu import Kernel

__all__ = ["BLOCK", "LANES", "Way", "copy_addresses", "finish", "norm"]

#: Elements that a program takes, and its warps.
BLOCK = 2048
WARPS = 8
#: Tensors whose numbers one program computes.
LANES = 128
#: Addresses that one launch of copy_addresses writes.
ADDRESSES = 32


class Way:
    """One way through a rule: its recording, and the kernels made of it, each once."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.update = functools.cache(functools.partial(update, recording))
        self.row_numbers = functools.cache(functools.partial(row_numbers, recording))
        self.names = functools.cache(self._names)
        self.host_numbers = functools.cache(self._host_numbers)

    def _names(self, type_: str) -> list[str]:
        """What the kernel calls the numbers that are the same for a whole tensor."""
        return list(numbers_of(assignments(self.recording.outputs, LANGUAGES[type_], lambda e: str(e.args[0]))))

    def _host_numbers(self, type_: str) -> Callable[..., tuple[float, ...]]:
        """A function that computes these from the recording's parameters."""
        return host_function(self.recording.outputs, self.recording.parameters, self.names(type_), type_)


def update(
    recording: Recording,
    dtypes: tuple[torch.dtype, ...],
    *,
    aligned: bool,
    maximize: bool,
    by_rows: bool,
    controlled: bool,
    stochastic: bool,
    counted: bool,
) -> Kernel:
    """The kernel of a rule.

    Its arguments: table, grads, tensors, blocks; rows, if the numbers come by rows; control, if there is one; counter, if
    seeds are counted; then the numbers, if not by rows; seed, if it rounds stochastically.

    Args:
        dtypes: of p, g and the slots.
        aligned: all tensors begin at multiples of 16 bytes.
        by_rows: numbers are read from a row for each tensor, else they are arguments.
        controlled: gradients are multiplied by control[0], and nothing is done if control[1] is not 0.
        stochastic: p is rounded stochastically.
        counted: the counter on the device is added to the seed.
    """
    type_ = compute_type(dtypes)
    wide = TYPES[type_]
    elements = dict(zip(recording.inputs, (ELEMENTS[d] for d in dtypes), strict=True))
    code = assignments(recording.outputs, LANGUAGES[type_], lambda e: str(e.args[0]))
    numbers = numbers_of(code)
    arguments = {"table": "*i64", "grads": "*i64", "tensors": "*i32", "blocks": "*i32"}
    if by_rows:
        arguments["rows"] = f"*{type_}"
    if controlled:
        arguments["control"] = "*fp32"
    if counted:
        arguments["counter"] = "*i64"
    tensors = len(arguments)
    if not by_rows:
        arguments |= {argument(u, e): type_ for u, e in numbers.items()}
    if stochastic:
        arguments["seed"] = "i64"

    slots = recording.slots
    width = len(slots) + 2
    lines = [
        "k = tl.program_id(0)",
        "i = tl.load(tensors + k)",
        "block = tl.load(blocks + k)",
        f"start = block.to(tl.int64) * {BLOCK}",
        f"n = tl.load(table + i * {width} + {width - 1}) - start",
        _pointer("g", "grads + i", elements["g"], aligned),
        *(_pointer(x, f"table + i * {width} + {j}", elements[x], aligned) for j, x in enumerate(("p", *slots))),
        *(f"{x}_out = {x}_ptr" for x in ("p", *slots)),
    ]
    if by_rows:
        lines += [
            f"{argument(u, e)} = tl.load(rows + i * {len(numbers)} + {j})" for j, (u, e) in enumerate(numbers.items())
        ]
    lines += [f"{u} = {argument(u, e)} != 0" for u, e in numbers.items() if e.is_condition]
    if controlled:
        lines.append(f"coefficient = tl.load(control).to({wide})")
    if stochastic:
        lines.append("key = seed + tl.load(counter) * 4294967296" if counted else "key = seed")

    step = _Step(code, elements, {x: elements[x] for x in ("p", *slots)}, type_, BLOCK)
    step.turned = ["g = g * coefficient"] * controlled + ["g = -g"] * maximize
    step.rounds = stochastic and elements["p"] in ("bf16", "fp16")
    text = signature(recording.name, arguments) + "".join(f"    {line}\n" for line in lines)
    if controlled:
        text += "    if tl.load(control + 1) == 0:\n" + step.text("        ")
    else:
        text += step.text("    ")
    return Kernel(recording.name, text, tensors, warps=WARPS)


def _pointer(name: str, place: str, type_: str, aligned: bool) -> str:
    address = f"tl.load({place}).to(tl.pointer_type({TYPES[type_]}))"
    return f"{name}_ptr = " + (f"tl.multiple_of({address}, 16) + start" if aligned else f"{address} + start")


class _Step(Block):
    """A rule's block: the gradient is scaled and turned before the rule sees it, and p may be rounded stochastically."""

    turned: Sequence[str] = ()
    rounds = False

    def compute(self) -> list[str]:
        return [*self.turned, *super().compute()]

    def store(self, name: str, mask: str) -> list[str]:
        if name != "p" or not self.rounds:
            return super().store(name, mask)
        # As round_stochastically_ of extras.py: to the neighbour on the side where the error points, or not.
        half = TYPES[self.outputs["p"]]
        infinity = "0x7F80" if half == "tl.bfloat16" else "0x7C00"
        return [
            f"exact = {self.result('p')}",
            f"nearest = exact.to({half})",
            "error = exact - nearest.to(tl.float32)",
            "bits = nearest.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF",
            "bits = tl.where((bits & 0x7FFF) == 0, tl.where(error < 0, 0x8000, 0), bits)",
            "away = (error > 0) == (bits < 0x8000)",
            "bits = tl.where(away, bits + 1, bits - 1)",
            f"neighbour = bits.to(tl.int16).to({half}, bitcast=True)",
            "chance = tl.div_rn(error, neighbour.to(tl.float32) - nearest.to(tl.float32))",
            "draw, _, _, _ = tl.philox(key, o, o * 0 + block, o * 0 + i, o * 0)",
            "moves = (tl.uint_to_uniform_float(draw) < chance) & (error != 0)",
            f"moves = moves & ((bits & {infinity}) != {infinity})",
            f"tl.store(p_out + o, tl.where(moves, neighbour, nearest){mask})",
        ]


def row_numbers(
    recording: Recording, type_: str, on_device: tuple[tuple[str, str], ...], step_type: str | None, controlled: bool
) -> tuple[Kernel, tuple[str, ...]]:
    """The kernel that computes a row of numbers for each tensor, and counts its step.

    Args:
        on_device: parameters that are tensors, and their types; the others, but t, are arguments.
        step_type: of the step counts; None without such.
        controlled: steps are not counted where control[1] is not 0.

    Returns:
        The kernel, with arguments: rows, then steps and places (of a tensor among the steps), then control, the
        tensors on the device, the number of tensors, and the other parameters; and the parameters' names.
    """
    code = assignments(recording.outputs, LANGUAGES[type_], lambda e: str(e.args[0]))
    numbers = numbers_of(code)
    devices = dict(on_device)
    arguments = {"rows": f"*{type_}"}
    if step_type:
        arguments |= {"steps": f"*{step_type}", "places": "*i32"}
    if controlled:
        arguments["control"] = "*fp32"
    arguments |= {f"{x}_in": f"*{t}" for x, t in devices.items()}
    tensors = len(arguments)
    arguments["count"] = "i32"
    given = tuple(x for x in recording.parameters if x not in devices and not (x == "t" and step_type))
    arguments |= {f"{x}_": "fp64" for x in given}
    lines = [f"i = tl.program_id(0) * {LANES} + tl.arange(0, {LANES})", "there = i < count"]
    if step_type:
        lines += [
            "place = tl.load(places + i, mask=there, other=0)",
            "step = tl.load(steps + place, mask=there, other=0.0)",
            "t = step.to(tl.float64) + 1.0",
            "step = step + tl.where(tl.load(control + 1) == 0, 1.0, 0.0)" if controlled else "step = step + 1.0",
            f"tl.store(steps + place, step.to({TYPES[step_type]}), mask=there)",
        ]
    lines += [f"{x} = tl.zeros([{LANES}], tl.float64) + {x}_" for x in given]
    lines += [f"{x} = tl.zeros([{LANES}], tl.float64) + tl.load({x}_in).to(tl.float64)" for x in devices]
    lines += [f"{a.name} = {a.text}" for a in code.uniform]
    for j, (u, e) in enumerate(numbers.items()):
        value = f"tl.where({u}, 1.0, 0.0)" if e.is_condition else u
        place = f"rows + i * {len(numbers)} + {j}"
        lines.append(f"tl.store({place}, (tl.zeros([{LANES}], tl.float64) + {value}).to({TYPES[type_]}), mask=there)")
    name = f"{recording.name}_numbers"
    text = signature(name, arguments) + "".join(f"    {line}\n" for line in lines)
    return Kernel(name, text, tensors), given


@functools.lru_cache(maxsize=32)
def norm(dtype: torch.dtype, aligned: bool) -> Kernel:
    """Partial sums of the squares of all gradients, one for each program, in float64: no square of a float32 overflows.

    Arguments: lengths (a column of the table: its address and how far apart), grads, tensors, blocks, partial, first
    (place of the first partial sum), count (of blocks).
    """
    arguments = {
        "table": "*i64", "grads": "*i64", "tensors": "*i32", "blocks": "*i32", "partial": "*fp64", "width": "i32",
        "first": "i32", "count": "i32",
    }  # fmt: skip
    squares = f"x = tl.load(g_ptr + o{{}}).to({TYPES['fp64']})\n"
    text = (
        signature("norm", arguments)
        + f"    total = tl.zeros([{BLOCK}], tl.float64)\n"
        + f"    o = tl.arange(0, {BLOCK})\n"
        + "    k = tl.program_id(0)\n"
        + "    while k < count:\n"
        + "        i = tl.load(tensors + k)\n"
        + f"        start = tl.load(blocks + k).to(tl.int64) * {BLOCK}\n"
        + "        n = tl.load(table + i * width + width - 1) - start\n"
        + f"        {_pointer('g', 'grads + i', ELEMENTS[dtype], aligned)}\n"
        + f"        if n >= {BLOCK}:\n"
        + f"            {squares.format('')}"
        + "        else:\n"
        + f"            {squares.format(', mask=o < n, other=0.0')}"
        + "        total += x * x\n"
        + "        k += tl.num_programs(0)\n"
        + "    tl.store(partial + first + tl.program_id(0), tl.sum(total))\n"
    )
    return Kernel("norm", text, 5, warps=WARPS)


@functools.lru_cache(maxsize=64)
def finish(partials: int, *, scaled: bool, found_inf: bool, skips: bool, clips: bool, counts_seeds: bool) -> Kernel:
    """What a step needs to know before it begins: control = [the gradients' factor, whether to skip].

    Args:
        partials: how many partial sums of squares there may be; 0 if no norm is wanted.
        scaled: there is a GradScaler's scale, which gradients are divided by.
        found_inf: there is its found_inf.
        skips: a norm that is not finite skips the step, and skipped steps are counted.
        clips: the factor clips to max_norm.
        counts_seeds: a counter of seeds counts up.

    Arguments: control, then those of partial, norm, scale, found, skipped, counter that are wanted, then count and max_norm.
    """
    arguments = {"control": "*fp32"}
    if partials:
        arguments |= {"partial": "*fp64", "norm": "*fp64"}
    if scaled:
        arguments["scale"] = "*fp32"
    if found_inf:
        arguments["found"] = "*fp32"
    if skips:
        arguments["skipped"] = "*i64"
    if counts_seeds:
        arguments["counter"] = "*i64"
    tensors = len(arguments)
    arguments |= {"count": "i32", "max_norm": "fp64"}
    lines = ["skip = tl.load(found) != 0" if found_inf else "skip = tl.full((), 0, tl.int1)"]
    lines.append("factor = tl.full((), 1.0, tl.float64)")
    if scaled:
        # Rounded as GradScaler.unscale_ rounds it.
        lines.append("factor = (1.0 / tl.load(scale).to(tl.float64)).to(tl.float32).to(tl.float64)")
    if partials:
        lines += [
            f"o = tl.arange(0, {partials})",
            "size = tl.sqrt(tl.sum(tl.load(partial + o, mask=o < count, other=0.0)))",
            *(["skip = skip | ~(size < float('inf'))"] if skips else []),
            *(["size = size / tl.load(scale).to(tl.float64)"] if scaled else []),
            "tl.store(norm, size)",
        ]
    if clips:
        lines += [
            "coefficient = max_norm / (size + tl.full((), 1e-6, tl.float64))",
            # NaN stays NaN.
            "factor = factor * tl.where(coefficient > 1.0, 1.0, coefficient).to(tl.float32).to(tl.float64)",
        ]
    lines += ["tl.store(control, factor.to(tl.float32))", "tl.store(control + 1, tl.where(skip, 1.0, 0.0))"]
    if skips:
        lines.append("tl.store(skipped, tl.load(skipped) + tl.where(skip, 1, 0))")
    if counts_seeds:
        lines.append("tl.store(counter, tl.load(counter) + 1)")
    text = signature("finish", arguments) + "".join(f"    {line}\n" for line in lines)
    return Kernel("finish", text, tensors)


@functools.cache
def copy_addresses() -> Kernel:
    """Writes its arguments into a table from place ``first`` on: a copy from the host that a CUDA graph can hold."""
    names: Sequence[str] = [f"a{j}" for j in range(ADDRESSES)]
    arguments = {"table": "*i64", "first": "i32", **dict.fromkeys(names, "i64")}
    text = signature("copy_addresses", arguments) + "".join(
        f"    tl.store(table + first + {j}, {name})\n" for j, name in enumerate(names)
    )
    return Kernel("copy_addresses", text, 1, warps=1)
