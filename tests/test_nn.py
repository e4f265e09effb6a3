"""torchcalc.nn as a drop-in for torch.nn: values, repr, state, copies."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from torchcalc import nn as ours

x, t = torch.linspace(-2, 2, 12).reshape(3, 4), torch.linspace(0, 1, 12).reshape(3, 4)
w = torch.tensor([0.5, 1.0, 2.0, 0.25])
CASES = {  # name: (constructor arguments, inputs)
    "Sigmoid": ({}, (x,)),
    "Tanh": ({}, (x,)),
    "ReLU": ({}, (x,)),
    "ReLU inplace": ({"inplace": True}, (x,)),
    "GELU": ({}, (x,)),
    "GELU tanh": ({"approximate": "tanh"}, (x,)),
    "Linear": ({"in_features": 4, "out_features": 2}, (x,)),
    "Linear without bias": (
        {"in_features": 4, "out_features": 2, "bias": False, "dtype": torch.float64},
        (x.double(),),
    ),
    "Softmax": ({"dim": 1}, (x,)),
    "LogSoftmax": ({"dim": 0}, (x,)),
    "MSELoss": ({"reduction": "sum"}, (x, t)),
    "L1Loss": ({"reduction": "none"}, (x, t)),
    "HuberLoss": ({"delta": 0.5}, (x, t)),
    "BCEWithLogitsLoss": ({"weight": w, "pos_weight": 2 * w}, (x, t)),
    "CrossEntropyLoss": ({"weight": w, "ignore_index": 1, "label_smoothing": 0.1}, (x, torch.tensor([0, 1, 3]))),
    "CrossEntropyLoss of probabilities": ({"reduction": "none"}, (x, t)),
}


def pair(case):
    """Ours and torch's, made from the same state of the random numbers."""
    arguments, inputs = CASES[case]
    modules = []
    for namespace in (ours, torch.nn):
        torch.manual_seed(1)
        modules.append(getattr(namespace, case.split()[0])(**arguments))
    return *modules, inputs


@pytest.mark.parametrize("case", CASES)
def test_value_repr_and_state(case):
    mine, theirs, inputs = pair(case)
    assert repr(mine) == repr(theirs)
    assert_close(dict(mine.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)  # the same draw of random numbers
    assert [n for n, _ in mine.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in mine.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert_close(mine(*map(torch.clone, inputs)), theirs(*map(torch.clone, inputs)))


@pytest.mark.parametrize("case", CASES)
def test_gradient_goes_through_our_function(case):
    mine, _, inputs = pair(case)
    y = mine(inputs[0].clone().requires_grad_() * 1, *inputs[1:])
    nodes = [y.grad_fn] if "inplace" not in case else [node for node, _ in y.grad_fn.next_functions]  # below a copy
    assert any(node.name().endswith(("FunctionBackward", "ResidualLossBackward")) for node in nodes), nodes


@pytest.mark.parametrize("case", CASES)
def test_copies(case):
    mine, theirs, inputs = pair(case)
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert type(twin) is type(mine)
        assert_close(twin(*map(torch.clone, inputs)), mine(*map(torch.clone, inputs)))
    for p in (q for m in (mine, theirs) for q in m.parameters()):
        torch.nn.init.normal_(p)
    mine.load_state_dict(theirs.state_dict())
    assert_close(mine(*map(torch.clone, inputs)), theirs(*map(torch.clone, inputs)))
    for p in mine.parameters():
        torch.nn.init.normal_(p)
    theirs.load_state_dict(mine.state_dict())
    assert_close(mine(*map(torch.clone, inputs)), theirs(*map(torch.clone, inputs)))


def test_square_is_a_module():
    assert_close(ours.Square()(x), x * x)


def test_a_network_of_them_learns_as_one_of_torch_does():
    losses = []
    for nn in (ours, torch.nn):
        torch.manual_seed(0)
        net = torch.nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.CrossEntropyLoss()(net(x), torch.tensor([0, 1, 2]))
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert_close(*losses)
    assert losses[0] < 0.5
