"""Triton from expressions: the tables of operations, and how a block of elements is loaded, computed and stored.

Only text is made here; :mod:`torchcalc.native.gpu` compiles it. What float32 and float64 compute is what torch's kernels compute:
roots and quotients are correctly rounded, functions are those of the platform's library, and float16 and bfloat16 are
computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from torchcalc.formula.code import Code, Language
from torchcalc.formula.expression import INFIX, UNARY, Expression

__all__ = ["ELEMENTS", "LANGUAGES", "TYPES", "Block", "argument", "compute_type", "numbers_of", "signature"]

#: Triton's names of the types that elements may have.
ELEMENTS = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
#: And the names under which its language knows them.
TYPES = {"fp32": "tl.float32", "fp64": "tl.float64", "fp16": "tl.float16", "bf16": "tl.bfloat16"}


def number(x: float, type_: str) -> str:
    """A literal.

    >>> number(0.1, "fp32"), number(-1.0, "fp32"), number(0.1, "fp64")
    ('0.1', '(-1.0)', 'tl.full((), 0.1, tl.float64)')
    """
    text = repr(x) if math.isfinite(x) else f'float("{x}")'
    # A bare number in the text is float32, or float64 where float32 has no such number that is not subnormal.
    if type_ == "fp32" and (x == 0 or not math.isfinite(x) or 2.0**-126 <= abs(x) <= torch.finfo(torch.float32).max):
        return text if math.copysign(1.0, x) > 0 else f"({text})"
    return f"tl.full((), {text}, {TYPES[type_]})"


def table(type_: str) -> dict[str, str]:
    """Operation → text, for elements of the type that is computed in."""
    single = type_ == "fp32"
    return {
        **{op: f"libdevice.{op}({{}})" for op in UNARY},
        **{op: f"{{}} {sign} {{}}" for op, sign in INFIX.items()},
        "abs": "tl.abs({})",
        "floor": "tl.floor({})",
        "neg": "-{}",
        "sgn": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
        # Triton's own / and sqrt are approximations in float32.
        "div": "tl.div_rn({}, {})" if single else "{} / {}",
        "sqrt": "tl.sqrt_rn({})" if single else "tl.sqrt({})",
        "sigmoid": "tl.div_rn(1.0, 1.0 + libdevice.exp(-{}))" if single else "1.0 / (1.0 + libdevice.exp(-{}))",
        "pow": "libdevice.pow({}, {})",
        "fma": "tl.fma({}, {}, {})",
        "not": "~({})",
        "where": "tl.where({}, {}, {})",
        "maximum": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
        "minimum": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    }


def _language(type_: str) -> Language:
    """Elements of the type; what is the same for all elements in float64, on the device."""
    uniform = {**table("fp64"), "fma": "{} * {} + {}", "rounded": f"({{}}).to({TYPES[type_]}).to(tl.float64)"}
    return Language(
        element=table(type_),
        uniform=uniform,
        literal=lambda x: number(x, type_),
        uniform_literal=lambda x: number(x, "fp64"),
    )


#: By the type that is computed in.
LANGUAGES = {type_: _language(type_) for type_ in ("fp32", "fp64")}


def compute_type(dtypes: Sequence[torch.dtype]) -> str:
    """float64 if something is, else float32."""
    return "fp64" if torch.float64 in dtypes else "fp32"


def signature(name: str, arguments: Mapping[str, str]) -> str:
    """The first line of a kernel.

    >>> signature("kernel", {"x": "*fp32", "n": "i64"})
    'def kernel(x: "*fp32", n: "i64"):\\n'
    """
    typed = ", ".join(f'{argument}: "{type_}"' for argument, type_ in arguments.items())
    return f"def {name}({typed}):\n"


def numbers_of(code: Code) -> dict[str, Expression]:
    """The uniform numbers that elements use: name → what it is."""
    used = {a for assignment in code.element for a in assignment.expression.children if a.is_uniform}
    return {u.name: u.expression for u in code.uniform if u.expression in used or u.name in code.results.values()}


def argument(name: str, e: Expression) -> str:
    """What the argument is called that brings a uniform number: a condition comes as 0 or 1."""
    return f"{name}_" if e.is_condition else name


class Block:
    """The text that computes one block of elements, from where pointers are to what is stored.

    Args:
        code: assignments for one element.
        inputs: name → element type, of pointers ``{name}_ptr`` to the block's first element.
        outputs: result's name → element type, likewise ``{name}_out``.
        type_: the type that is computed in.
        size: elements in a block; of these the first n are there.
    """

    def __init__(
        self, code: Code, inputs: Mapping[str, str], outputs: Mapping[str, str], type_: str, size: int
    ) -> None:
        self.code, self.inputs, self.outputs, self.type_, self.size = code, inputs, outputs, type_, size

    def text(self, indent: str) -> str:
        """A whole block without a mask, whose accesses then are 16 bytes wide; or with one, where n ends within it."""
        return (
            f"{indent}o = tl.arange(0, {self.size})\n"
            f"{indent}if n >= {self.size}:\n{self._lines(indent, '')}"
            f"{indent}else:\n{self._lines(indent, ', mask=o < n')}"
        )

    def _lines(self, indent: str, mask: str) -> str:
        lines = self.load(mask) + self.compute()
        for name in self.outputs:
            lines += self.store(name, mask)
        return "".join(f"{indent}    {line}\n" for line in lines)

    def load(self, mask: str) -> list[str]:
        other = f"{mask}, other=0.0" if mask else ""
        return [f"{name} = tl.load({name}_ptr + o{other}).to({TYPES[self.type_]})" for name in self.inputs]

    def compute(self) -> list[str]:
        return [f"{a.name} = {a.text}" for a in self.code.element]

    def store(self, name: str, mask: str) -> list[str]:
        return [f"tl.store({name}_out + o, ({self.result(name)}).to({TYPES[self.outputs[name]]}){mask})"]

    def result(self, name: str) -> str:
        """An output as a block, also where it is the same for all elements."""
        text = self.code.results[name]
        if text in self.inputs or any(a.name == text for a in self.code.element):
            return text
        return f"tl.zeros([{self.size}], {TYPES[self.type_]}) + {text}"
