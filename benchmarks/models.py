"""Shapes of parameters to benchmark with."""

from __future__ import annotations

from math import prod

Shape = tuple[int, ...]


def gpt(layers: int, width: int, vocabulary: int, context: int) -> list[Shape]:
    """Parameters of GPT-2 (Radford et al. 2019), the output layer tied to the embedding."""
    block: list[Shape] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


SMALL = gpt(layers=4, width=64, vocabulary=256, context=128)
LARGE = gpt(layers=12, width=768, vocabulary=50257, context=1024)


def elements(shapes: list[Shape]) -> int:
    return sum(prod(shape) for shape in shapes)
