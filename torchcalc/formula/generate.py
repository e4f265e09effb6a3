"""The C++ that is built from all formulas and rules: ``sources()`` maps file names to their text."""

from __future__ import annotations

from torchcalc.formula.cpp import is_heavy, kernel
from torchcalc.formula.dispatch import is_built
from torchcalc.formula.expression import Expression
from torchcalc.formula.pointwise import FORMULAS, Formula

__all__ = ["sources"]

FILES = 4  # compiled side by side


def sources() -> dict[str, str]:
    """The kernels of every formula and of every optimizer's rule.

    >>> sorted(sources())[0], "struct ReLU_value" in "".join(sources().values())
    ('formulas_0.cpp', True)
    """
    import torchcalc.functional  # noqa: F401  defines them
    from torchcalc.formula.rule_cpp import rule_file
    from torchcalc.optim.kernel import all_recordings

    formulas = [f for f in FORMULAS.values() if is_built(f)]
    return {f"formulas_{i}.cpp": file_of(formulas[i::FILES]) for i in range(FILES)} | {
        f"rule_{name}.cpp": rule_file(recordings) for name, recordings in all_recordings().items()
    }


def file_of(formulas: list[Formula]) -> str:
    """One file: the kernels and their entries in the table."""
    kernels = "\n".join(map(kernels_of, formulas))
    entries = "\n".join(f"const Registered {f.name}_registered({entry_of(f)});" for f in formulas)
    return (
        '// Generated from formulas.\n#include "math.h"\n#include "pointwise.h"\n\n'
        f"namespace torchcalc {{\nnamespace {{\n\n{kernels}\n{entries}\n\n}}  // namespace\n}}  // namespace torchcalc\n"
    )


def kernels_of(f: Formula) -> str:
    structs = [kernel(f"{f.name}_value", f.inputs, f.parameters, f.expression)]
    structs += [
        kernel(f"{f.name}_product_{i}", ("g", *f.inputs, "y"), f.parameters, product)
        for i, product in enumerate(f.products)
        if product is not None
    ]
    return "\n".join(structs)


def entry_of(f: Formula) -> str:
    """A Formula of ``pointwise.h``."""

    def entry(name: str, arguments: tuple[str, ...], e: Expression | None) -> str:
        if e is None:
            return "{}"
        uses = sum(1 << i for i, argument in enumerate(arguments) if argument in e.inputs())
        return f"kernel_of<{name}>({uses}u, {'true' if is_heavy(e) else 'false'})"

    products = ", ".join(
        entry(f"{f.name}_product_{i}", ("g", *f.inputs, "y"), product) for i, product in enumerate(f.products)
    )
    value = entry(f"{f.name}_value", f.inputs, f.expression)
    return f'{{"{f.name}", "{f.hash}", {len(f.inputs)}, {value}, {{{products}}}}}'
