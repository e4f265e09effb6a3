"""The C++ of a recorded rule: a struct as ``native/csrc/rule.h`` describes it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torchcalc.formula.code import assignments
from torchcalc.formula.cpp import CPP
from torchcalc.formula.expression import Expression, walk
from torchcalc.formula.rule import Recording

__all__ = ["rule_file"]


def rule_file(recordings: Iterable[Recording]) -> str:
    """A file with the kernel of each recording."""
    structs = "\n".join(map(rule_struct, recordings))
    return (
        '#include "rule.h"\n\nnamespace torchcalc {\nnamespace {\n\n'
        f"{structs}\n}}  // namespace\n}}  // namespace torchcalc\n"
    )


def rule_struct(recording: Recording) -> str:
    code = assignments(recording.outputs, CPP, lambda e: _name(e, recording))
    used = {e.args[0] for e in walk(recording.outputs.values()) if e.op == "input"}
    written = {name: result for name, result in code.results.items() if result != _input(name)}
    places = {name: f"x.s[{k}]" for k, name in enumerate(recording.slots)} | {"p": "x.p", "g": "x.g"}
    struct = f"{recording.name}_{recording.hash}"

    in_loop = set(re.findall(r"\bu\d+\b", " ".join([*(a.text for a in code.element), *code.results.values()])))
    kept = [a.name for a in code.uniform if a.name in in_loop]
    uniform = [f"const double {a.name} = {a.text};" for a in code.uniform]
    uniform += [f"u[{i}] = {name};" for i, name in enumerate(kept)]
    numbers = [f"const T {name} = number<T>(x.u[{i}]);" for i, name in enumerate(kept)]
    numbers.append("const T factor = x.factor;")
    pointers = [
        f"{'' if n in written else 'const '}T* const {_input(n)}_at = {places[n]};"
        for n in recording.inputs
        if n in used or n in written
    ]
    loads = [
        f"const T {_input(n)} = {_input(n)}_at[i]{' * factor' * (n == 'g')};" for n in recording.inputs if n in used
    ]
    body = [f"const auto {a.name} = {a.text};" for a in code.element]
    stores = [f"{_input(n)}_at[i] = {result};" for n, result in written.items()]
    return f"""\
struct {struct} {{
  static constexpr int64_t hash = {recording.number};
  static constexpr int slots = {len(recording.slots)}, parameters = {len(recording.parameters)}, uniforms = {len(kept)};

  template <class T>
  static void uniform([[maybe_unused]] const double* a, [[maybe_unused]] double* u) {{
    {_lines(uniform, 4)}
  }}

  template <bool Fma, class T>
  static TC_INLINE void run(const RuleSlice<T>& x, int64_t begin, int64_t end) {{
    {_lines([*numbers, *pointers], 4)}
    TC_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) {{
      {_lines([*loads, *body, *stores], 6)}
    }}
  }}
}};
const AddRule<{struct}> add_{struct};
"""


def _input(name: str) -> str:
    return f"x_{name}"


def _name(e: Expression, recording: Recording) -> str:
    return _input(e.args[0]) if e.op == "input" else f"a[{recording.parameters.index(e.args[0])}]"


def _lines(lines: list[str], indent: int) -> str:
    return ("\n" + " " * indent).join(lines)
