"""The C++ files that are made from formulas when the kernels are built."""

from __future__ import annotations

__all__ = ["sources"]


def sources() -> dict[str, str]:
    """File name -> C++ text."""
    from torchcalc.formula.rule_cpp import rule_file
    from torchcalc.optim.kernel import all_recordings

    return {f"rule_{name}.cpp": rule_file(recordings) for name, recordings in all_recordings().items()}
