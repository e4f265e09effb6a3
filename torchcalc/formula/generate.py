"""The C++ that is built from all formulas and rules: ``sources()`` maps file names to their text."""

from __future__ import annotations

from torchcalc.formula.cpp import kernel
from torchcalc.formula.dispatch import is_built
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
    kernels = "\n".join(text for f in formulas for text in kernels_of(f).values())
    entries = "\n".join(f"const Registered {f.name}_registered({entry_of(f)});" for f in formulas)
    return (
        '// Generated from formulas.\n#include "math.h"\n#include "pointwise.h"\n\n'
        f"namespace torchcalc {{\nnamespace {{\n\n{kernels}\n{entries}\n\n}}  // namespace\n}}  // namespace torchcalc\n"
    )


def kernels_of(f: Formula) -> dict[str, str]:
    """Name → text, in the order of a Formula of ``pointwise.h``: the value, all gradients, these and the value, each gradient."""
    known, products = ("g", *f.inputs, "y"), [p for p in f.products if p is not None]
    found = {f"{f.name}_value": kernel(f"{f.name}_value", f.inputs, f.parameters, [f.expression])}
    if len(products) > 1:
        found[f"{f.name}_joint"] = kernel(f"{f.name}_joint", known, f.parameters, products)
    if f.whole:
        found[f"{f.name}_whole"] = kernel(f"{f.name}_whole", known, f.parameters, list(f.together.values()))
    for i, product in enumerate(f.products):
        if product is not None:
            found[f"{f.name}_product_{i}"] = kernel(f"{f.name}_product_{i}", known, f.parameters, [product])
    return found


def entry_of(f: Formula) -> str:
    """A Formula of ``pointwise.h``."""
    names = kernels_of(f)

    def entry(name: str) -> str:
        return f"kernel_of<{name}>()" if name in names else "{}"

    products = ", ".join(entry(f"{f.name}_product_{i}") for i in range(len(f.products)))
    return (
        f'{{"{f.name}", "{f.hash}", {len(f.inputs)}, {entry(f"{f.name}_value")}, {entry(f"{f.name}_joint")}, '
        f"{entry(f'{f.name}_whole')}, {{{products}}}}}"
    )
