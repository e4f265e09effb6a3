"""The graph against gradients computed by other means, and bytes counted by saved_tensors_hooks."""

import builtins
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchcalc
from torchcalc.calculus import BackwardGraph, backward_graph


def by_name(graph: BackwardGraph) -> dict[str, Any]:
    return {node.function: node for node in graph.nodes}


def test_gradients_shapes_and_names(device: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(device)
    x, y = torch.randn(6, 4, device=device), torch.randint(3, (6,), device=device)
    kept = [model[0](x)]
    kept.append(model[1](kept[0]))
    kept.append(model[2](kept[1]))
    for t in kept:
        t.retain_grad()
    loss = nn.functional.cross_entropy(kept[2], y)
    graph = backward_graph(loss, model)
    assert all(p.grad is None for p in model.parameters())
    for t in kept:
        t.grad = None  # retain_grad is a hook
    loss.backward()  # the graph is still there
    nodes = by_name(graph)
    for name, p in model.named_parameters():
        assert nodes[name].is_leaf and nodes[name].shapes == (tuple(p.shape),)
        assert nodes[name].norm == pytest.approx(p.grad.norm().item(), rel=1e-5)
    assert nodes["tanh"].norm == pytest.approx(kept[1].grad.norm().item(), rel=1e-5)
    assert nodes["tanh"].shapes == nodes["tanh"].input_shapes == ((6, 5),)
    assert nodes["log_softmax"].norm == pytest.approx(6**-0.5, rel=1e-5)
    first = graph.nodes[0]
    assert (first.function, first.norm, first.shapes) == ("nll_loss", 1, ((),))
    second = next(n for n in graph.nodes if n.function == "addmm")
    assert set(second.input_shapes) == {(3,), (6, 5), (5, 3)}
    for i, node in enumerate(graph.nodes):
        assert all(j > i for j in node.inputs)  # in the order of backward
    assert nodes.keys() == {"nll_loss", "log_softmax", "addmm", "tanh", "t", *dict(model.named_parameters())}


def test_contributions_add_up() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * 3
    graph = backward_graph((y * y).sum() + y.sum(), grad_output=torch.tensor(2.0))
    assert graph.nodes[0].norm == 2
    arriving = 2 * (2 * y + 1).detach()
    assert [n.norm for n in graph.nodes if n.function == "mul"][-1] == pytest.approx(arriving.norm().item())
    (leaf,) = (n for n in graph.nodes if n.is_leaf)
    assert leaf.function == "leaf" and leaf.norm == pytest.approx(3 * arriving.norm().item())


def saved_outside_leaves(f: Any, leaves: list[Tensor]) -> int:
    """Bytes that saved_tensors_hooks see, each storage once, without those of leaves."""
    sizes, own = {}, {t.untyped_storage().data_ptr() for t in leaves}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t  # t keeps the pointer its own
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = f()
    del output
    return sum(n for p, (n, _) in sizes.items() if p not in own)


MODELS = {
    "mlp": (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), (5, 8)),
    "own": (nn.Sequential(nn.Linear(8, 16), torchcalc.nn.GELU(), nn.Linear(16, 8), torchcalc.nn.Tanh()), (5, 8)),
    "convolution": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), (4, 2, 8, 8)),
    "attention": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 5, 16)),
    "recurrent": (nn.LSTM(4, 6), (7, 2, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_any_model(name: str) -> None:
    model, shape = MODELS[name]
    x = torch.randn(shape)

    def output() -> Tensor:
        torch.manual_seed(0)
        y = model(x)
        return (y[0] if isinstance(y, tuple) else y).square().sum()

    graph = backward_graph(output(), model)
    expected = saved_outside_leaves(output, list(model.parameters()))
    assert graph.saved_bytes == expected
    leaves = {n.function for n in graph.nodes if n.is_leaf}
    assert leaves == {n for n, _ in model.named_parameters()}
    assert "packed" not in str(graph)


def test_parameters_are_not_counted_but_named() -> None:
    w = torch.randn(10, 10, requires_grad=True)
    x = torch.randn(3, 10)
    graph = backward_graph((x @ w @ w).sum())
    mm = graph.nodes[1]
    assert mm.function == "mm" and mm.shared_bytes == 400 and mm.saved == "120 B (400 B of leaves)"
    assert graph.saved_bytes == 120 + 120  # x, and x @ w


def test_checkpointing_is_seen_and_not_disturbed() -> None:
    calls = []
    layer = nn.Linear(4, 4)

    def block(x: Tensor) -> Tensor:
        calls.append(1)
        return layer(x).sigmoid()

    y = checkpoint(block, torch.randn(2, 4), use_reentrant=False).sum()
    graph = backward_graph(y, layer)
    assert by_name(graph)["sigmoid"].packed == 1 and "(1 packed)" in str(graph)
    assert graph.saved_bytes == 0 and len(calls) == 2  # forward, and once again in backward


def test_a_gradient_that_has_vanished_is_measured() -> None:
    x = torch.ones(4, requires_grad=True)
    assert backward_graph((x * 1e-30).sum()).nodes[-1].norm == pytest.approx(2e-30, rel=1e-5)


def test_nested_tensors() -> None:
    x = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], requires_grad=True, layout=torch.jagged)
    graph = backward_graph(x.exp().values().sum())
    assert graph.nodes[-1].norm == pytest.approx(3 * math.e, rel=1e-5)


def test_table() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    text = str(backward_graph(model(torch.ones(2, 4)).sum(), model))
    lines = text.split("\n")
    assert re.split(" {2,}", lines[0].strip()) == ["#", "function", "output", "<- inputs", "gradient", "saved", "to"]
    column = lines[0].index("output")
    assert all(line[column - 1] == " " and line[column] == "(" for line in lines[1:-1])
    assert re.match(r"\d+ B saved for backward in 6 nodes", lines[-1])


def chain(length: int) -> Tensor:
    x = torch.ones(2, requires_grad=True)
    for _ in range(length):
        x = x.sin()
    return x.sum()


def test_figure() -> None:
    pytest.importorskip("matplotlib")
    figure = backward_graph(chain(5)).figure()
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert len([t for t in texts if t.startswith("sin\n2, ")]) == 5 and sum(t.startswith("leaf") for t in texts) == 1
    figure.canvas.draw()
    long = backward_graph(chain(100)).figure(most=20)
    texts = [t.get_text() for t in long.axes[0].texts if t.get_text()]
    assert len(texts) == 20 and "… 83 nodes left out …" in texts
    with pytest.raises(ValueError, match="most: 2"):
        backward_graph(chain(5)).figure(most=2)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, real = backward_graph(chain(2)), builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'torchcalc\[recipes\]'"):
        graph.figure()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="output: it has no graph"):
        backward_graph(torch.ones(()))
    with pytest.raises(ValueError, match=r"grad_output: its shape is \(2,\)"):
        backward_graph(chain(1), grad_output=torch.ones(2))
    x = torch.ones(2, requires_grad=True)
    for call, message in (
        (lambda: backward_graph((chain(1),)), "output: a tuple"),
        (lambda: backward_graph({"loss": chain(1)}), "output: a dict"),
        (lambda: backward_graph(chain(1), grad_output=2.0), "grad_output: a float"),
        (lambda: backward_graph(chain(1), x), "model: a Tensor; pass the nn.Module"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        backward_graph(checkpoint(torch.sin, x, use_reentrant=True).sum())
    freed = chain(1)
    freed.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward_graph(freed)
