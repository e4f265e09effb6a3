"""A :class:`BackwardGraph` as a picture: layers from the loss down, boxes coloured by the norm of the gradient.

A node's layer is the length of the longest path to it from the output, so every arrow points down. Within a layer nodes
stand in the order of the mean place of those that point to them, which undoes most crossings (Sugiyama, Tagawa, Toda
1981, doi:10.1109/TSMC.1981.4308636).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from torchcalc.calculus.backward_graph import BackwardGraph, BackwardNode

__all__ = ["draw"]

WIDTH, HEIGHT = 1.6, 0.75  # inches of a place in the grid
HALF = 0.25  # of the height of a box, in places


def draw(graph: BackwardGraph, most: int) -> Figure:
    """The figure of a graph, of at most so many nodes."""
    if most < 3:
        raise ValueError(f"most: {most}; it must be at least 3")
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'torchcalc[recipes]'") from error
    nodes = _shortened(graph.nodes, most)
    places = _places(nodes)
    across, down = max(x for x, _ in places) - min(x for x, _ in places) + 1, max(y for _, y in places) + 1
    figure = Figure(figsize=(max(across * WIDTH, 3) + 1.2, down * HEIGHT + 0.5), layout="constrained")
    axes = figure.add_subplot()
    norms = [n.norm for n in nodes if 0 < n.norm < math.inf] or [1.0]
    low, high = min(norms), max(norms)
    scale = LogNorm(low, high if high > low else 10 * low)
    colors = colormaps["viridis"]
    for node, (x, y) in zip(nodes, places, strict=True):
        for i in node.inputs:
            to, below = places[i]
            arrow = dict(arrowstyle="-|>", color="0.6", shrinkA=0, shrinkB=0, linewidth=0.8)
            axes.annotate("", xy=(to, below - HALF), xytext=(x, y + HALF), arrowprops=arrow, zorder=1)
    for node, (x, y) in zip(nodes, places, strict=True):
        flows = 0 < node.norm < math.inf
        color = colors(scale(node.norm)) if flows else "white"
        dark = flows and scale(node.norm) < 0.6
        style = "round,pad=0.35" if node.is_leaf else "square,pad=0.35"
        box = dict(boxstyle=style, facecolor=color, edgecolor="0.4")
        ink = "white" if dark else "black"
        axes.text(x, y, _label(node), ha="center", va="center", fontsize=7, color=ink, bbox=box, zorder=2)
    axes.set_xlim(min(x for x, _ in places) - 0.6, max(x for x, _ in places) + 0.6)
    axes.set_ylim(down - 0.4, -0.6)
    axes.set_axis_off()
    axes.set_title(f"backward: {len(graph.nodes)} nodes", fontsize=9)
    bar = figure.colorbar(ScalarMappable(scale, colors), ax=axes, shrink=min(1.0, 3 / (down * HEIGHT)), aspect=25)
    bar.set_label("norm of the gradient", fontsize=8)
    return figure


def _label(node: BackwardNode) -> str:
    if not node.shapes:
        return node.function
    shape = "×".join(map(str, node.shapes[0])) or "scalar"
    return f"{node.function}\n{shape}, {node.norm:.3g}"


def _shortened(nodes: tuple[BackwardNode, ...], most: int) -> tuple[BackwardNode, ...]:
    """The first and the last nodes that backward visits, with one in between for the others."""
    if len(nodes) <= most:
        return nodes
    head, tail = most // 2, most - most // 2 - 1
    left_out = len(nodes) - head - tail

    def place(i: int) -> int:
        return i if i < head else max(head, i - left_out + 1)

    def kept(i: int) -> BackwardNode:
        return replace(nodes[i], inputs=tuple(dict.fromkeys(map(place, nodes[i].inputs))))

    between = replace(
        nodes[head],
        function=f"… {left_out} nodes left out …",
        shapes=(),
        norm=0.0,
        is_leaf=False,
        inputs=tuple(dict.fromkeys(j for n in nodes[head:-tail] for i in n.inputs if (j := place(i)) > head)),
    )
    return (*map(kept, range(head)), between, *map(kept, range(len(nodes) - tail, len(nodes))))


def _places(nodes: tuple[BackwardNode, ...]) -> list[tuple[float, int]]:
    """(x, layer) of each node; layers are centred."""
    layer = [0] * len(nodes)
    users: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        for j in node.inputs:
            layer[j] = max(layer[j], layer[i] + 1)
            users[j].append(i)
    x = [0.0] * len(nodes)
    for depth in range(max(layer) + 1):
        members = [i for i in range(len(nodes)) if layer[i] == depth]
        wanted = {i: sum(x[u] for u in users[i]) / len(users[i]) if users[i] else 0.0 for i in members}
        members.sort(key=lambda i: wanted[i])
        middle = sum(wanted.values()) / len(members)
        for k, i in enumerate(members):
            x[i] = middle + k - (len(members) - 1) / 2
    return list(zip(x, layer, strict=True))
