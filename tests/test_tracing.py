"""torch.fx records our functions and modules as leaves, derivatives included; TorchScript refuses them in plain words."""

import copy
import pickle

import pytest
import torch
from torch.fx import symbolic_trace
from torch.testing import assert_close

import torchcalc.functional as ours
from tests.functions import ROWS
from tests.test_functional import WITHOUT_A_ROW
from tests.test_nn import CASES, pair
from torchcalc import nn as our_nn
from torchcalc.autograd import Function


def of_tensors(f, n):
    """f of exactly n arguments, which is what torch.fx can trace."""
    names = ", ".join(f"a{i}" for i in range(n))
    return eval(f"lambda {names}: f({names})", {"f": f})


def gradient(f, *inputs):
    first = inputs[0].clone()
    if not first.is_floating_point() and not first.is_complex():
        return (f(first, *inputs[1:]).detach(),)
    first.requires_grad_()
    y = f(first * 1, *inputs[1:])
    return y.detach(), *torch.autograd.grad(y.sum() if y.is_floating_point() else y.real.sum(), first)


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("name", sorted({*ours.__all__} - WITHOUT_A_ROW))
def test_a_function_is_a_leaf(name):
    row = next(row for row in ROWS if row.name.split()[0] == name)
    inputs, nothing = row.inputs(), [x is None for x in row.inputs()]

    def call(*given):
        tensors = iter(given)
        return row.ours(*(None if missing else next(tensors) for missing in nothing))

    inputs = [x for x in inputs if x is not None]
    traced = symbolic_trace(of_tensors(call, len(inputs)))
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert any(f.__module__.startswith("torchcalc.") for f in functions), functions
    assert_close(gradient(traced, *inputs), gradient(call, *inputs), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_module_traces_as_torchs_does(case):
    mine, _, inputs = pair(case)
    traced = symbolic_trace(mine)
    assert_close(gradient(traced, *map(torch.clone, inputs)), gradient(mine, *map(torch.clone, inputs)), rtol=0, atol=0)


def test_dropout_is_a_leaf():
    traced = symbolic_trace(lambda x: ours.dropout(x, 0.4))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [ours.dropout]
    results = []
    for f in (traced, lambda x: ours.dropout(x, 0.4)):
        torch.manual_seed(0)
        results.append(gradient(f, torch.ones(20)))
    assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mse_loss", "huber_loss", "softmax"])
def test_the_function_itself_is_traced(name):
    assert [n.target for n in symbolic_trace(getattr(ours, name)).graph.nodes if n.op == "call_function"] == [
        getattr(ours, name)
    ]


def test_a_net_and_its_copies():
    net = torch.nn.Sequential(our_nn.Linear(4, 3), our_nn.GELU(), our_nn.Linear(3, 2), our_nn.LogSoftmax(-1))
    x = torch.randn(5, 4)
    traced = symbolic_trace(net)
    for twin in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert_close(gradient(twin, x), gradient(net, x), rtol=0, atol=0)


class Identity(Function):
    """Its derivative is not that of forward."""

    @staticmethod
    def forward(x, k=1.0):
        return k * x

    @staticmethod
    def backward(ctx, g):
        return 5 * g, None


def test_a_function_of_ones_own_keeps_its_derivative_and_can_be_pickled():
    x = torch.ones(2)
    for f in (symbolic_trace(lambda x: Identity.apply(x, 2.0)), symbolic_trace(lambda x: Identity.apply(x))):
        assert_close(gradient(f, x)[1], 5 * x)
    assert pickle.loads(pickle.dumps(Identity.apply)) is Identity.apply


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:Warning")  # deprecated
@pytest.mark.parametrize("name", our_nn.__all__)
def test_torchscript_is_refused_and_the_model_left_alone(name):
    arguments = next(given for case, (given, _) in CASES.items() if case.split()[0] == name)
    module = getattr(our_nn, name)(**arguments)
    net = torch.nn.Sequential(module)
    stock = f"torch.nn.{name} " if hasattr(torch.nn, name) else f"torch.{name.lower()} "
    if not hasattr(torch.nn, name) and not hasattr(torch, name.lower()):
        stock = "torch.nn.Sequential " if issubclass(type(module), torch.nn.Sequential) else "torch's functions "
    for scripted in (module, net):
        with pytest.raises(TypeError, match=rf"cannot compile torchcalc.*{name},.*put .*{stock}"):
            torch.jit.script(scripted)
    assert net[0] is module
