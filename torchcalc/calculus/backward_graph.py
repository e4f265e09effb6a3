"""The chain rule at work: the graph that autograd walks, and what flows through it.

For a loss L that is computed from y, and y from x by an operation with Jacobian J, the chain rule passes on

    ∂L/∂x = Jᵀ·∂L/∂y,                                                             (1)

and where x is used by several operations their contributions add up,

    ∂L/∂x = Σₖ Jₖᵀ·∂L/∂yₖ.                                                        (2)

Every operation of the forward pass leaves a node that knows how to multiply by its Jᵀ, and has saved for it what J
depends on. Backward visits the nodes from the loss to the leaves, each after all that use its output; the norm shown at
a node is that of ∂L/∂y when it gets there: of what (2) has added up. A deep network trains where it neither vanishes
nor explodes on the way.

Reference: Griewank and Walther 2008, "Evaluating derivatives", doi:10.1137/1.9780898717761, chapter 3.
"""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchcalc.calculus.operations import saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BackwardGraph", "BackwardNode", "backward_graph"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BackwardNode:
    """One operation of the forward pass, seen from backward.

    Attributes:
        function: its name in torch ("addmm", "relu"); for a leaf the parameter's name, or "leaf".
        shapes: of its outputs.
        inputs: the nodes that the gradient goes to, as indices into ``BackwardGraph.nodes``.
        input_shapes: of the inputs that they stand for.
        norm: the norm of the gradient that arrives, (2); 0 if none does.
        saved_bytes: memory that stays allocated for this node until backward; what several nodes save is counted at
            the first of them, and what a leaf owns, parameters above all, is not counted.
        shared_bytes: what it saves that leaves own.
        packed: tensors that are saved by way of hooks (checkpointing, offloading): their bytes are not known.
        is_leaf: whether the gradient ends here.

    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> node = backward_graph(x.exp()).nodes[0]
    >>> node.function, node.shapes, node.saved, node.is_leaf
    ('exp', ((2,),), '8 B', False)
    """

    function: str
    shapes: tuple[Shape, ...]
    inputs: tuple[int, ...]
    input_shapes: tuple[Shape, ...]
    norm: float
    saved_bytes: int
    shared_bytes: int
    packed: int
    is_leaf: bool

    @property
    def saved(self) -> str:
        """The bytes in words."""
        parts = [_bytes(self.saved_bytes)] if self.saved_bytes else []
        parts += [f"({_bytes(self.shared_bytes)} of leaves)"] if self.shared_bytes else []
        parts += [f"({self.packed} packed)"] if self.packed else []
        return " ".join(parts)


@dataclass(frozen=True)
class BackwardGraph:
    """The nodes, from the output to the leaves; ``print`` shows the table, :meth:`figure` draws it.

    Attributes:
        nodes: each after all that pass gradients to it.

    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> print(backward_graph((x**2).sum()))
    #  function  output  <- inputs  gradient            saved  to
    0  sum       ()      (2,)              1                   1
    1  pow       (2,)    (2,)          1.414  (8 B of leaves)  2
    2  leaf      (2,)                     10
    0 B saved for backward in 3 nodes
    """

    nodes: tuple[BackwardNode, ...]

    @property
    def saved_bytes(self) -> int:
        """Memory that the graph keeps allocated until backward, besides its leaves."""
        return sum(node.saved_bytes for node in self.nodes)

    def __str__(self) -> str:
        head = ("#", "function", "output", "<- inputs", "gradient", "saved", "to")
        rows = [head]
        for i, n in enumerate(self.nodes):
            to = ", ".join(map(str, n.inputs))
            shapes, inputs = _shapes(n.shapes), _shapes(n.input_shapes)
            rows.append((str(i), n.function, shapes, inputs, f"{n.norm:.4g}", n.saved, to))
        widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
        sides = (str.rjust, str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.ljust)
        lines = ["  ".join(side(c, w) for side, c, w in zip(sides, row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{_bytes(self.saved_bytes)} saved for backward in {len(self.nodes)} nodes"])

    def figure(self, *, most: int = 60) -> Figure:
        """The graph as a matplotlib Figure: the loss on top, the leaves below, coloured by the norm of the gradient.

        Args:
            most: nodes to draw, >= 3; of a larger graph those nearest the output and those nearest the leaves, with
                one box in between that says how many were left out.

        Raises:
            ImportError: matplotlib is missing. ValueError: most is below 3.
        """
        from torchcalc.calculus.graph_figure import draw

        return draw(self, most)


def backward_graph(
    output: Tensor, model: nn.Module | None = None, *, grad_output: Tensor | None = None
) -> BackwardGraph:
    """Run the chain rule through the graph of an output, and record what flows and what was saved.

    Backward runs once, with hooks, and the graph is kept, so that ``output.backward()`` works afterwards; the ``.grad``
    of leaves is not touched. Hooks of your own on the graph's tensors, of which ``retain_grad`` is one, run too.

    Args:
        output: a tensor with a graph, such as a loss.
        model: its parameters' names are then those of the leaves.
        grad_output: ∂L/∂output, like output; by default ones: L is the output, or its sum.

    Raises:
        TypeError: output or grad_output is no tensor, or model no module.
        ValueError: output has no graph, or grad_output is not of its shape.
        RuntimeError: the graph has been freed by a backward before, or is checkpointed with ``use_reentrant=True``, whose
            backward is a call of ``.backward()``.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Sigmoid())
    >>> graph = backward_graph(model(torch.ones(1, 2)), model)
    >>> [node.function for node in graph.nodes]
    ['sigmoid', 'mm', 't', '0.weight']
    """
    for name, value in (("output", output), ("grad_output", grad_output)):
        if not isinstance(value, Tensor) and (name == "output" or value is not None):
            raise TypeError(f"{name}: a {type(value).__name__}; pass one tensor")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: a {type(model).__name__}; pass the nn.Module, or grad_output by its name")
    if output.grad_fn is None:
        raise ValueError("output: it has no graph; compute it from tensors that require grad, outside torch.no_grad()")
    if grad_output is None:
        grad_output = torch.ones_like(output)
    if grad_output.shape != output.shape:
        raise ValueError(
            f"grad_output: its shape is {tuple(grad_output.shape)}; that of output is {tuple(output.shape)}"
        )
    nodes = _ordered(output.grad_fn)
    names = {p: name for name, p in model.named_parameters()} if model is not None else {}
    leaves = [n.variable for n in nodes if _is_leaf(n)]
    counter = _Saved(leaves)
    memory = [counter.of(n) for n in nodes]
    norms = _gradients(output, grad_output, nodes, leaves)
    index = {n: i for i, n in enumerate(nodes)}
    found = []
    for node, (own, shared, packed), norm in zip(nodes, memory, norms, strict=True):
        following = [(n, k) for n, k in node.next_functions if n is not None]
        leaf = node.variable if _is_leaf(node) else None
        found.append(
            BackwardNode(
                function=_name(node) if leaf is None else names.get(leaf, "leaf"),
                shapes=tuple(tuple(m.shape) for m in node._input_metadata),
                inputs=tuple(dict.fromkeys(index[n] for n, _ in following)),
                input_shapes=tuple(tuple(n._input_metadata[k].shape) for n, k in following),
                norm=norm,
                saved_bytes=own,
                shared_bytes=shared,
                packed=packed,
                is_leaf=leaf is not None,
            )
        )
    return BackwardGraph(tuple(found))


def _ordered(root: Any) -> list[Any]:
    """All nodes by their distance from the output, that of the longest path: each after all that pass gradients to it."""
    users: dict[Any, int] = {root: 0}
    waiting = [root]
    while waiting:
        for n in _following(waiting.pop()):
            if n not in users:
                users[n] = 0
                waiting.append(n)
            users[n] += 1
    layer, ready = {root: 0}, [root]
    for node in ready:  # grows on the way
        for n in _following(node):
            layer[n] = max(layer.get(n, 0), layer[node] + 1)
            users[n] -= 1
            if not users[n]:
                ready.append(n)
    return sorted(ready, key=layer.__getitem__)


def _following(node: Any) -> list[Any]:
    return [n for n, _ in node.next_functions if n is not None]


def _gradients(output: Tensor, grad_output: Tensor, nodes: list[Any], leaves: list[Tensor]) -> list[float]:
    """The norm of what arrives at each node."""
    squares: dict[Any, float] = {}

    def arrived(node: Any, grads: tuple[Tensor | None, ...]) -> None:
        squares[node] = sum(_norm(g) ** 2 for g in grads if g is not None)

    with ExitStack() as stack:
        for node in nodes:
            if not _is_leaf(node):
                stack.callback(node.register_prehook(partial(arrived, node)).remove)
        found = torch.autograd.grad(output, leaves, grad_output, retain_graph=True, allow_unused=True)
    for leaf, gradient in zip((n for n in nodes if _is_leaf(n)), found, strict=True):
        arrived(leaf, (gradient,))
    return [math.sqrt(squares.get(n, 0.0)) for n in nodes]


class _Saved:
    """Counts the bytes of each storage once; those of the leaves apart."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self._leaves = {_storage(t) for t in leaves}
        self._seen: set[tuple[Any, ...]] = set()

    def of(self, node: Any) -> tuple[int, int, int]:
        """(own, shared with leaves, packed) of a node."""
        own, shared, packed, here = 0, 0, 0, set()
        for kept in saved(node):
            if kept.unpack_hook is not None:
                packed += 1
                continue
            tensor = kept.data
            if tensor is None:
                continue
            key = _storage(tensor)
            size = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else 0
            if key in here:
                continue
            here.add(key)
            if key in self._leaves:
                shared += size
            elif key not in self._seen:
                self._seen.add(key)
                own += size
        return own, shared, packed


def _storage(tensor: Tensor) -> Any:
    """What two tensors have in common if they share memory."""
    if tensor.layout != torch.strided:
        return id(tensor)
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def _norm(gradient: Tensor) -> float:
    """In double precision: the square of a gradient that has vanished to 1e-23 is no float32."""
    g = gradient.detach()
    g = g.values() if g.is_nested else g.to_dense()
    dtype = torch.complex128 if g.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(g, dtype=dtype))


def _is_leaf(node: Any) -> bool:
    return bool(node.name() == "torch::autograd::AccumulateGrad")


def _name(node: Any) -> str:
    """NllLossBackward0 -> nll_loss."""
    name = re.sub(r"(Function)?(Backward\d*)?$", "", node.name().rsplit("::", 1)[-1]) or node.name()
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _shapes(shapes: tuple[Shape, ...]) -> str:
    return " ".join("(" + ", ".join(map(str, s)) + ("," if len(s) == 1 else "") + ")" for s in shapes)


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"
