"""Pointwise formulas on a GPU: one kernel for a value, one for a product with the incoming gradient, and a loss with its
reduction in two; from text of :mod:`torchcalc.formula.triton`, made at first use.

Tensors are taken as they lie, if they are dense and all lie alike (:func:`fits`): an element's place does not matter to a
formula of elements. Every call is one launch and one new tensor; a loss of more than one block makes partial sums first. Partial
sums are float64 where they meet, and always meet in the same order: the same bits at every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchcalc.formula.code import assignments
from torchcalc.formula.expression import Expression
from torchcalc.formula.numbers import host_function
from torchcalc.formula.triton import ELEMENTS, LANGUAGES, TYPES, Block, argument, compute_type, numbers_of, signature
from torchcalc.native import gpu

if TYPE_CHECKING:
    from torchcalc.formula.pointwise import Formula

__all__ = ["fits", "launch_loss", "launch_loss_product", "launch_product", "launch_value", "launch_whole"]

BLOCK = 1024
WARPS = 4
#: Programs of a reduction, each of which walks through every so many blocks.
PROGRAMS = 1024

PLAIN = (Tensor, torch.nn.Parameter)


def fits(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels take these tensors: plain, on one GPU, of supported dtypes, dense and all lying alike."""
    x = tensors[0]
    if not gpu.takes(x.device):
        return False
    contiguous = x.is_contiguous()
    if not contiguous and not gpu.is_dense(x):
        return False
    shape, device, strides = x.shape, x.device, None if contiguous else x.stride()
    for t in tensors:
        if type(t) not in PLAIN or t.dtype not in ELEMENTS or t.layout is not torch.strided or t.is_neg():
            return False
        if not torch._C._has_storage(t):  # a batch of gradients, for is_grads_batched=True
            return False
        if t.device != device or t.shape != shape:
            return False
        if not t.is_contiguous() if contiguous else t.stride() != strides:
            return False
    return True


def launch_value(formula: Formula, inputs: Sequence[Tensor], parameters: Sequence[float] = ()) -> Tensor:
    """The formula's value; of the inputs' dtype, the wider one if they differ."""
    x = inputs[0]
    y = torch.empty_like(x, dtype=_result_type(inputs))
    n = x.numel()
    if n:
        tensors = [*inputs, y]
        found = find(formula, "value", tensors)
        found.kernel.launch(x.device, -(-n // BLOCK), tensors, (n, *found.numbers(*parameters)))
    return y


def launch_product(
    formula: Formula,
    index: int,
    g: Tensor,
    saved: Sequence[Tensor | None],
    parameters: Sequence[float] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of the input at that index.

    Args:
        g: the incoming gradient.
        saved: the inputs, then the output; None for those which the product does not use.
        dtype: of the result; that of the input, or else of g, if None.
    """
    own = saved[index]
    out = torch.empty_like(g, dtype=dtype or (g if own is None else own).dtype)
    n = g.numel()
    if n:
        found = find(formula, index, [g, *saved, out])
        tensors = [g, *(t for t in saved if t is not None), out]
        found.kernel.launch(g.device, -(-n // BLOCK), tensors, (n, *found.numbers(*parameters)))
    return out


def launch_whole(formula: Formula, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of all inputs, and then the value; all of one dtype, and no parameters."""
    n = g.numel()
    results = [torch.empty_like(g) for _ in (*inputs, g)]
    if n:
        tensors = [g, *inputs, *results]
        find(formula, "whole", tensors).kernel.launch(g.device, -(-n // BLOCK), tensors, (n,))
    return results


def launch_loss(
    formula: Formula, inputs: Sequence[Tensor], parameters: Sequence[float] = (), *, scale: float = 1.0
) -> Tensor:
    """The sum of the formula's values times a number (1/n for a mean), rounded once, as a 0-dimensional tensor.

    Weights are an input like others: write ``weight * value`` for a weighted loss.
    """
    x = inputs[0]
    n = x.numel()
    blocks = -(-n // BLOCK)
    loss = torch.empty((), dtype=_result_type(inputs), device=x.device)
    if blocks <= 1:
        tensors = [*inputs, loss]
        found = find(formula, "loss", tensors)
        found.kernel.launch(x.device, 1, tensors, (n, scale, *found.numbers(*parameters)))
        return loss
    programs = min(blocks, PROGRAMS)
    partial = torch.empty(programs, dtype=torch.float64, device=x.device)
    found = find(formula, "partial", [*inputs, partial])
    found.kernel.launch(x.device, programs, [*inputs, partial], (n, *found.numbers(*parameters)))
    total(loss.dtype).launch(x.device, 1, [partial, loss], (programs, scale))
    return loss


def launch_loss_product(
    formula: Formula,
    index: int,
    g: Tensor,
    saved: Sequence[Tensor | None],
    parameters: Sequence[float] = (),
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of :func:`launch_loss` with respect to the input at that index, for the loss's own gradient g.

    Args:
        g: the incoming gradient, 0-dimensional.
        saved: the inputs; None for those which the product does not use.
        scale: that of the loss.
        dtype: of the result; that of the input, or else of g, if None.
    """
    own = saved[index]
    x = next(t for t in (own, *saved) if t is not None)
    out = torch.empty_like(x, dtype=dtype or (g if own is None else own).dtype)
    n = x.numel()
    if n:
        found = find(formula, (index,), [g, *saved, out])
        tensors = [g, *(t for t in saved if t is not None), out]
        found.kernel.launch(x.device, -(-n // BLOCK), tensors, (n, scale, *found.numbers(*parameters)))
    return out


class Launcher(NamedTuple):
    kernel: gpu.Kernel
    numbers: Any  # from the parameters to those numbers that elements use
    block: int = BLOCK  # elements of one program


#: By formula (held, so that its id stays its own), kind, and the tensors' dtypes and alignment.
_launchers: dict[Any, tuple[Formula, Launcher]] = {}
_totals: dict[torch.dtype, gpu.Kernel] = {}


def find(formula: Formula, kind: Any, tensors: Sequence[Tensor | None]) -> Launcher:
    """The launcher for a kind of pass.

    These are "value", "whole", an index for a product, "loss", "partial", and (index,) for a loss's product.
    """
    dtypes: list[torch.dtype | None] = []
    low = 0
    for t in tensors:
        if t is None:
            dtypes.append(None)
        else:
            dtypes.append(t.dtype)
            low |= t.data_ptr()
    key = id(formula), kind, low & 15, *dtypes
    found = _launchers.get(key)
    if found is None:
        launcher = _make(formula, kind, dtypes, low & 15 == 0)
        found = _launchers[key] = formula, launcher
    return found[1]


def _make_whole(formula: Formula, dtype: torch.dtype, aligned: bool) -> Launcher:
    inputs = dict.fromkeys(("g", *formula.inputs), ELEMENTS[dtype])
    outputs = dict.fromkeys(formula.together, ELEMENTS[dtype])
    type_ = compute_type([dtype])
    code = assignments(
        formula.together, LANGUAGES[type_], lambda e: f"{e.args[0]}_at"
    )  # an input and a result share a name
    named = {f"{x}_at": element for x, element in inputs.items()}
    arguments = {f"{x}_in": f"*{t}" for x, t in inputs.items()} | {f"{x}_to": f"*{t}" for x, t in outputs.items()}
    block = Block(code, named, outputs, type_, BLOCK)
    text = signature(f"{formula.name}_whole", arguments | {"n": "i64"})
    text += f"    start = tl.program_id(0).to(tl.int64) * {BLOCK}\n    n = n - start\n"
    text += "".join(f"    {x}_at_ptr = {x}_in + start\n" for x in inputs)
    text += "".join(f"    {x}_out = {x}_to + start\n" for x in outputs) + block.text("    ")
    count = len(arguments)
    kernel = gpu.Kernel(f"{formula.name}_whole", text, count, aligned=count if aligned else 0, warps=WARPS)
    return Launcher(kernel, lambda: ())


def _make(formula: Formula, kind: Any, dtypes: Sequence[torch.dtype | None], aligned: bool) -> Launcher:
    if kind == "whole":
        assert dtypes[0] is not None
        return _make_whole(formula, dtypes[0], aligned)
    product = not isinstance(kind, str)
    index = kind[0] if isinstance(kind, tuple) else kind
    names = ["g", *formula.inputs, "y"] if product else list(formula.inputs)
    if isinstance(kind, tuple):
        names.remove("y")
    known = [d for d in dtypes if d is not None]
    type_ = compute_type(known)
    output = formula.products[index] if product else formula.expression
    if output is None:
        raise ValueError(
            f"{formula.name} has no gradient for {formula.inputs[index]!r}, but a kernel for it was asked for"
        )
    inputs = {name: ELEMENTS[d] for name, d in zip(names, dtypes[:-1], strict=True) if d is not None}
    lacking = output.inputs() - set(inputs)
    if lacking:
        raise ValueError(f"the kernel of {formula.name} needs {sorted(lacking)}; save them for backward")
    code = assignments({"out": output}, LANGUAGES[type_], lambda e: str(e.args[0]))
    numbers = numbers_of(code)
    suffix = f"product_{formula.inputs[index]}" if product else kind
    name = f"{formula.name}_{suffix}"
    text = _text(name, kind, code, inputs, known[-1], type_, numbers)
    kernel = gpu.Kernel(name, text, len(inputs) + 1, aligned=len(inputs) + 1 if aligned else 0, warps=WARPS)
    return Launcher(kernel, host_function({"out": output}, formula.parameters, list(numbers), type_))


def _text(
    name: str,
    kind: Any,
    code: Any,
    inputs: dict[str, str],
    out: torch.dtype,
    type_: str,
    numbers: dict[str, Expression],
) -> str:
    scalar = "g" if isinstance(kind, tuple) else None  # a loss's gradient is one number
    reduces = kind in ("loss", "partial")
    arguments = {f"{x}_in": f"*{t}" for x, t in inputs.items()}
    arguments |= {"out": f"*{ELEMENTS[out]}", "n": "i64"}
    if kind == "loss" or scalar:
        arguments["scale"] = "fp64"
    arguments |= {argument(u, e): type_ for u, e in numbers.items()}
    lines = [f"{u} = {argument(u, e)} != 0" for u, e in numbers.items() if e.is_condition]
    wide = TYPES[type_]
    if scalar:
        lines.append(f"g = (tl.load(g_in).to(tl.float64) * scale).to({wide})")
    each = [x for x in inputs if x != scalar]
    block = Block(code, {x: inputs[x] for x in each}, {"out": ELEMENTS[out]}, type_, BLOCK)
    pointers = "".join(f"{{0}}{x}_ptr = {x}_in + start\n" for x in each)
    head = signature(name, arguments) + "".join(f"    {line}\n" for line in lines)
    if not reduces:
        return (
            f"{head}    start = tl.program_id(0).to(tl.int64) * {BLOCK}\n    n = n - start\n"
            + pointers.format("    ")
            + "    out_out = out + start\n"
            + block.text("    ")
        )
    summed = [
        f"    total = tl.zeros([{BLOCK}], {wide})",
        f"    o = tl.arange(0, {BLOCK})",
        f"    start = tl.program_id(0).to(tl.int64) * {BLOCK}",
        "    while start < n:",
        pointers.format("        ").rstrip(),
        f"        if n - start >= {BLOCK}:",
        *(f"            {line}" for line in block.load("") + block.compute()),
        f"            total += {block.result('out')}",
        "        else:",
        *(f"            {line}" for line in block.load(", mask=o < n - start") + block.compute()),
        f"            total += tl.where(o < n - start, {block.result('out')}, 0.0)",
        f"        start += tl.num_programs(0) * {BLOCK}",
        "    total = tl.sum(total.to(tl.float64))",
    ]
    if kind == "loss":
        summed.append(_stored("total * scale", out))
    else:
        summed.append("    tl.store(out + tl.program_id(0), total)")
    return head + "\n".join(line for line in summed if line) + "\n"


def _stored(total: str, out: torch.dtype) -> str:
    wide = "" if out == torch.float64 else ".to(tl.float32)"  # float64 to a half type goes through float32, as in torch
    return f"    tl.store(out, ({total}){wide}.to({TYPES[ELEMENTS[out]]}))"


def total(out: torch.dtype) -> gpu.Kernel:
    """The sum of partial sums, times a number."""
    if out not in _totals:
        text = signature("total", {"partial": "*fp64", "out": f"*{ELEMENTS[out]}", "n": "i64", "scale": "fp64"}) + (
            f"    o = tl.arange(0, {PROGRAMS})\n"
            "    total = tl.sum(tl.load(partial + o, mask=o < n, other=0.0))\n" + _stored("total * scale", out) + "\n"
        )
        _totals[out] = gpu.Kernel("total", text, 2, warps=WARPS)
    return _totals[out]


def _result_type(inputs: Sequence[Tensor]) -> torch.dtype:
    dtype = inputs[0].dtype
    for t in inputs[1:]:
        if t.dtype != dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype
