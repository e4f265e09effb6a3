"""torchcalc.nn as a drop-in for torch.nn: values, repr, state, copies."""

import copy
import inspect
import pickle

import pytest
import torch
from torch.testing import assert_close

from tests import stock
from torchcalc import functional
from torchcalc import nn as ours
from torchcalc.formula.pointwise import FORMULAS

x, t = torch.linspace(-2, 2, 12).reshape(3, 4), torch.linspace(0, 1, 12).reshape(3, 4)
w = torch.tensor([0.5, 1.0, 2.0, 0.25])
w5 = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5])
CASES = {  # name: (constructor arguments, inputs)
    "Sigmoid": ({}, (x,)),
    "Tanh": ({}, (x,)),
    "ReLU": ({}, (x,)),
    "ReLU inplace": ({"inplace": True}, (x,)),
    "GELU": ({}, (x,)),
    "GELU tanh": ({"approximate": "tanh"}, (x,)),
    "SiLU": ({}, (x,)),
    "SiLU inplace": ({"inplace": True}, (x,)),
    "Mish": ({}, (x,)),
    "Mish inplace": ({"inplace": True}, (x,)),
    "Softplus": ({"beta": 2.5, "threshold": 1.0}, (x,)),
    "ELU": ({"alpha": 0.3}, (x,)),
    "ELU inplace": ({"inplace": True}, (x,)),
    "LeakyReLU": ({"negative_slope": 0.3}, (x,)),
    "LeakyReLU inplace": ({"inplace": True}, (x,)),
    "LogSigmoid": ({}, (x,)),
    "GLU": ({"dim": 1}, (x,)),
    "Square": ({}, (x,)),
    "Exp": ({}, (x,)),
    "Log": ({}, (t + 1,)),
    "Abs": ({}, (x,)),
    "Linear": ({"in_features": 4, "out_features": 2}, (x,)),
    "Linear without bias": (
        {"in_features": 4, "out_features": 2, "bias": False, "dtype": torch.float64},
        (x.double(),),
    ),
    "RMSNorm": ({"normalized_shape": 4, "eps": 0.1}, (x,)),
    "RMSNorm without weight": ({"normalized_shape": (3, 4), "elementwise_affine": False}, (x,)),
    "LayerNorm": ({"normalized_shape": 4, "eps": 0.1, "dtype": torch.float64}, (x.double(),)),
    "LayerNorm without bias": ({"normalized_shape": (3, 4), "bias": False}, (x,)),
    "LayerNorm without weight": ({"normalized_shape": 4, "elementwise_affine": False}, (x,)),
    "GroupNorm": ({"num_groups": 2, "num_channels": 4, "eps": 0.1}, (x,)),
    "GroupNorm without weight": ({"num_groups": 4, "num_channels": 4, "affine": False}, (x.reshape(1, 4, 3),)),
    **(
        {"GroupNorm without bias": ({"num_groups": 2, "num_channels": 4, "bias": False}, (x,))}
        if "bias" in inspect.signature(torch.nn.GroupNorm).parameters
        else {}
    ),
    "Dropout": ({"p": 1e-9}, (x,)),  # the two draw one after the other, but drop nothing
    "Dropout inplace": ({"p": 1e-9, "inplace": True}, (x,)),
    "MLP": ({"in_features": 4, "hidden_features": 5, "out_features": 2, "activation": "relu"}, (x,)),
    "MLP recomputed": ({"in_features": 4, "hidden_features": 5, "bias": False, "recompute": True}, (x,)),
    "GatedMLP": ({"in_features": 4, "hidden_features": 5, "out_features": 2, "activation": "gelu"}, (x,)),
    "GatedMLP recomputed": ({"in_features": 4, "hidden_features": 5, "bias": True, "recompute": True}, (x,)),
    "Embedding": ({"num_embeddings": 5, "embedding_dim": 3, "padding_idx": 1}, (torch.tensor([[0, 1], [4, 1]]),)),
    "Embedding sparse": ({"num_embeddings": 5, "embedding_dim": 3, "sparse": True}, (torch.tensor([0, 1]),)),
    "Embedding of few": (
        {"num_embeddings": 5, "embedding_dim": 3, "max_norm": 0.5, "norm_type": 1.0, "scale_grad_by_freq": True},
        (torch.tensor([[0, 1], [4, 1]]),),
    ),
    "Softmax": ({"dim": 1}, (x,)),
    "LogSoftmax": ({"dim": 0}, (x,)),
    "MSELoss": ({"reduction": "sum"}, (x, t)),
    "L1Loss": ({"reduction": "none"}, (x, t)),
    "HuberLoss": ({"delta": 0.5, "reduction": "none"}, (x, t)),
    "SmoothL1Loss": ({"beta": 0.5, "reduction": "sum"}, (x, t)),
    "BCELoss": ({"weight": w, "reduction": "sum"}, (t / 2 + 0.2, t)),
    "KLDivLoss": ({"reduction": "batchmean", "log_target": True}, (x, t)),
    "PoissonNLLLoss": ({"log_input": False, "full": True, "eps": 0.1, "reduction": "sum"}, (t + 0.5, 3 * t)),
    "GaussianNLLLoss": ({"full": True, "eps": 0.5, "reduction": "sum"}, (x, t, t + 0.2)),
    "BCEWithLogitsLoss": ({"weight": w, "pos_weight": 2 * w, "reduction": "sum"}, (x, t)),
    "CrossEntropyLoss": ({"weight": w, "ignore_index": 1, "label_smoothing": 0.1}, (x, torch.tensor([0, 1, 3]))),
    "LinearCrossEntropyLoss": (
        {
            "in_features": 4,
            "num_classes": 5,
            "bias": True,
            "weight": w5,
            "ignore_index": 1,
            "label_smoothing": 0.1,
            "reduction": "sum",
        },
        (x, torch.tensor([0, 1, 3])),
    ),
    "LinearCrossEntropyLoss with torch's options": (
        {"in_features": 4, "num_classes": 5, "options": stock.LinearCrossEntropyOptions()},
        (x, torch.tensor([0, 1, 3])),
    ),
    "LinearCrossEntropyLoss of two dimensions": (
        {"in_features": 4, "num_classes": 5, "out_features": (2,)},
        (x, torch.tensor([[0, 1], [3, 4], [2, 2]])),
    ),
    "CrossEntropyLoss of probabilities": ({"reduction": "none"}, (x, t)),
}


#: Functions whose module torch names otherwise.
MODULES = {
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "cross_entropy": "CrossEntropyLoss",
    "kl_div": "KLDivLoss",
    "linear_cross_entropy": "LinearCrossEntropyLoss",
    "gated_mlp": "GatedMLP",
    "mlp": "MLP",
}
WITHOUT_A_MODULE = {"add_rms_norm", "geglu", "reglu", "scaled_dot_product_attention", "softcap", "swiglu"}


def named(namespace, name):
    """Where torch never had it, ours; where only newer torch has it, its definition."""
    return getattr(namespace, name, getattr(stock, name, getattr(ours, name)))


def pair(case):
    """Ours and torch's, made from the same state of the random numbers."""
    arguments, inputs = CASES[case]
    modules = []
    for namespace in (ours, torch.nn):
        torch.manual_seed(1)
        modules.append(named(namespace, case.split()[0])(**arguments))
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
    """A node of ours: of the engine, or of a formula; torch's are named with a number at the end."""
    mine, _, inputs = pair(case)
    first = inputs[0].clone()
    y = mine(first.requires_grad_() * 1 if first.is_floating_point() else first, *inputs[1:])
    nodes, below = [y.grad_fn], []
    while nodes:
        below.append((node := nodes.pop()).name())
        nodes += [next_node for next_node, _ in node.next_functions if next_node is not None]
    ours_and_formulas = ("FunctionBackward", *(f"{name}Backward" for name in FORMULAS))
    assert any(name.endswith(ours_and_formulas) for name in below), below


def test_every_module_has_a_case():
    assert {case.split()[0] for case in CASES} == set(ours.__all__)


@pytest.mark.parametrize("name", ours.__all__)
def test_every_argument_of_a_module_has_a_case(name):
    """With another value than its default; where a module lacks an argument of torch's, it cannot be constructed."""
    module = getattr(ours, name)
    defaults = {n: p.default for n, p in inspect.signature(module).parameters.items() if p.kind is not p.VAR_POSITIONAL}
    given = {
        n
        for case, (arguments, _) in CASES.items()
        if case.split()[0] == name
        for n, v in arguments.items()
        if v is not defaults.get(n)
    }
    unused = {"size_average", "reduce", "device", "kwargs", "dtype"}  # deprecated, or of the constructor alone
    unused |= {"scale", "_weight", "_freeze"} if name == "Embedding" else set()  # layers/test_embedding.py
    unused |= (
        {"z_loss", "softcap", "recompute", "filter_eps"} if "CrossEntropy" in name else set()
    )  # not torch's: test_cross_entropy.py
    assert not set(defaults) - given - unused


@pytest.mark.parametrize("case", [case for case in CASES if "inplace" in case])
def test_in_place(case):
    """The result is in the input, which is returned, and its gradient is right."""
    mine, theirs, (x,) = pair(case)
    results = []
    for module in (mine, theirs):
        leaf = x.clone().requires_grad_()
        given = leaf * 1
        y = module(given)
        assert y is given
        results.append((y.detach().clone(), torch.autograd.grad((y * x.cos()).sum(), leaf)))
    assert_close(*results)


def test_every_argument_named_inplace_is_tried():
    assert {case.split()[0] for case in CASES if "inplace" in case} == {
        name for name in ours.__all__ if "inplace" in inspect.signature(getattr(ours, name)).parameters
    }


def test_every_function_with_a_module_in_torch_has_one_here():
    """One that was left out of nn.py: torch.nn's names, less case, underscores and what they are kinds of."""
    names = {n.lower(): n for space in (stock, torch.nn) for n, kind in vars(space).items() if isinstance(kind, type)}
    for function in functional.__all__:
        plain = MODULES.get(function, function.replace("_", ""))
        if plain.lower() in names:
            assert names[plain.lower()] in ours.__all__, function
        else:
            assert function in WITHOUT_A_MODULE or plain.capitalize() in ours.__all__, function


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


@pytest.mark.parametrize("name", sorted(n for n in ours.__all__ if not hasattr(torch.nn, n) and not hasattr(stock, n)))
def test_value_of_a_module_that_torch_lacks(name):
    _, inputs = CASES[name]
    assert_close(getattr(ours, name)()(*inputs), getattr(torch, name.lower())(*inputs))


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
