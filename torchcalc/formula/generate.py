"""Stand-in until the recorder is here: what the C++ files will be called, and what stands in them."""

from __future__ import annotations


def sources() -> dict[str, str]:
    """File name -> C++ text."""
    return {}
