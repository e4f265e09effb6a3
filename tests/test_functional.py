"""torchcalc.functional as a drop-in for torch.nn.functional: signatures, exceptions, warnings."""

import ast
import inspect
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import torchcalc.functional as ours
from tests.functions import ROWS
from torchcalc import nn as our_nn

F = torch.nn.functional


def stock(name):
    return getattr(F, name, None) or getattr(torch, name)


def parameters(f):
    return [(p.name, p.default) for p in inspect.signature(f).parameters.values()]


#: What torch lacks: the arguments are what the docstring says.
OURS_ONLY = {
    "square": ["input"],
    "softcap": ["input", "cap"],
    "swiglu": ["a", "b"],
    "geglu": ["a", "b", "approximate"],
    "reglu": ["a", "b"],
    "linear_cross_entropy": [  # before torch 2.13
        "input", "linear_weight", "target", "linear_bias", "weight", "reduction", "ignore_index", "label_smoothing", "options",
        "memory", "z_loss", "softcap", "token_weight", "normalizer", "metrics", "recompute", "filter_eps",
    ],
}  # fmt: skip
OURS_ONLY |= {"mlp": ["input", "weight1", "weight2", "bias1", "bias2", "activation", "recompute"]}
OURS_ONLY |= {
    "gated_mlp": [
        "input", "gate_weight", "up_weight", "down_weight", "gate_bias", "up_bias", "down_bias", "activation", "recompute",
    ],
}  # fmt: skip
OURS_ONLY |= {"add_rms_norm": ["input", "residual", "normalized_shape", "weight", "eps"]}


#: What draws random numbers is no function of tensors alone: its test file has the checks.
WITHOUT_A_ROW = {"dropout"}


#: What ours take besides, by keyword alone.
MORE = {
    "embedding": ["scale"],
    "cross_entropy": ["z_loss", "softcap", "token_weight", "normalizer"],
    "linear_cross_entropy": [
        "memory",
        "z_loss",
        "softcap",
        "token_weight",
        "normalizer",
        "metrics",
        "recompute",
        "filter_eps",
    ],
}


@pytest.mark.parametrize("name", ours.__all__)
def test_signature(name):
    """Names and defaults, of a builtin of torch as its docstring's first line has them."""
    if name in OURS_ONLY and not hasattr(F, name):
        assert [p for p, _ in parameters(getattr(ours, name))] == OURS_ONLY[name]
        return
    try:
        expected = parameters(stock(name))
    except ValueError:  # a builtin
        expected = documented(stock(name))
    found = inspect.signature(getattr(ours, name)).parameters
    assert all(found[extra].kind is inspect.Parameter.KEYWORD_ONLY for extra in MORE.get(name, ()))
    assert [p for p in parameters(getattr(ours, name)) if p[0] not in MORE.get(name, ())] == expected


def test_every_function_has_its_rows_and_its_test_file():
    tests = Path(__file__).parent
    for name in {*ours.__all__} - WITHOUT_A_ROW:
        *_, family, stem = getattr(ours, name).__module__.split(".")
        assert f'@table("{name}")' in (tests / family / f"test_{stem}.py").read_text(), name
    assert {row.name.split()[0] for row in ROWS} == {*ours.__all__} - WITHOUT_A_ROW


@pytest.mark.parametrize("name", our_nn.__all__)
def test_every_module_stands_beside_its_function(name):
    """A file of a family whose functions or modules are not in the index."""
    public = {*ours.__all__, *our_nn.__all__}
    assert set(sys.modules[getattr(our_nn, name).__module__].__all__) <= public


def documented(f):
    arguments = re.search(r"\w+\(([^)]*)\)", f.__doc__).group(1).replace("*,", "").split(",")
    names_and_defaults = [(*re.sub(r":[^=]*", "", a).strip().split("="), None)[:2] for a in arguments]
    return [
        (name.strip(), inspect.Parameter.empty if default is None else ast.literal_eval(default.strip()))
        for name, default in names_and_defaults
        if name.strip() != "out"
    ]


@pytest.mark.parametrize("name", our_nn.__all__)
def test_module_signature(name):
    mine, theirs = getattr(our_nn, name), getattr(torch.nn, name, torch.nn.Module)
    assert issubclass(mine, theirs)
    if theirs is not torch.nn.Module:
        more = MORE.get(
            {
                "CrossEntropyLoss": "cross_entropy",
                "LinearCrossEntropyLoss": "linear_cross_entropy",
                "Embedding": "embedding",
            }.get(name),
            (),
        )
        assert [p for p in parameters(mine) if p[0] not in more] == parameters(theirs)
        assert [p for p in parameters(mine.forward) if p[0] not in more] == parameters(theirs.forward)


def t(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def y(*values):
    return torch.tensor(values)


EXCEPTIONS = {
    "attention sizes": lambda F: F.scaled_dot_product_attention(t(2, 3, 4), t(2, 3, 5), t(2, 3, 4)),
    "attention mask": lambda F: F.scaled_dot_product_attention(t(2, 3, 4), t(2, 3, 4), t(2, 3, 4), t(2, 5, 5) > 0),
    "attention mask and causal": lambda F: F.scaled_dot_product_attention(
        t(2, 3, 4), t(2, 3, 4), t(2, 3, 4), t(3, 3) > 0, is_causal=True
    ),
    "attention dtypes": lambda F: F.scaled_dot_product_attention(
        t(2, 3, 4), t(2, 3, 4, dtype=torch.float64), t(2, 3, 4)
    ),
    "attention groups": lambda F: F.scaled_dot_product_attention(
        t(1, 3, 3, 4), t(1, 2, 3, 4), t(1, 2, 3, 4), enable_gqa=True
    ),
    "attention one dimension": lambda F: F.scaled_dot_product_attention(t(4), t(4), t(4)),
    "dropout p": lambda F: F.dropout(t(3), 1.5),
    "embedding index": lambda F: F.embedding(y(0, 7), t(3, 2)),
    "embedding float index": lambda F: F.embedding(t(2), t(3, 2)),
    "embedding weight": lambda F: F.embedding(y(0, 1), t(3)),
    "embedding padding": lambda F: F.embedding(y(0, 1), t(3, 2), padding_idx=3),
    "mse shapes": lambda F: F.mse_loss(t(3), t(4)),
    "mse reduction": lambda F: F.mse_loss(t(3), t(3), reduction="max"),
    "mse weight size": lambda F: F.mse_loss(t(3), t(3), weight=t(1)),
    "mse weight reduction": lambda F: F.mse_loss(t(3), t(3), reduction="max", weight=t(3)),
    "mse complex": lambda F: F.mse_loss(t(3, dtype=torch.cfloat), t(3, dtype=torch.cfloat)),
    "mse integers": lambda F: F.mse_loss(y(1, 2), y(1, 2)),
    "l1 reduction": lambda F: F.l1_loss(t(3), t(3), reduction="max"),
    "l1 weight size": lambda F: F.l1_loss(t(3), t(3), weight=t(1)),
    "huber delta": lambda F: F.huber_loss(t(3), t(3), delta=0.0),
    "huber negative delta": lambda F: F.huber_loss(t(3), t(3), "sum", -1.0),
    "huber weight size": lambda F: F.huber_loss(t(3), t(3), weight=t(1)),
    "huber reduction": lambda F: F.huber_loss(t(3), t(3), reduction="max"),
    "bce size": lambda F: F.binary_cross_entropy_with_logits(t(3), t(1)),
    "bce reduction": lambda F: F.binary_cross_entropy_with_logits(t(3), t(3), reduction="max"),
    "bce weight": lambda F: F.binary_cross_entropy_with_logits(t(3), t(3), t(2)),
    "bce large weight": lambda F: F.binary_cross_entropy_with_logits(t(3), t(3), t(2, 3)),
    "bce pos_weight": lambda F: F.binary_cross_entropy_with_logits(t(3), t(3), pos_weight=t(2)),
    "bce integers": lambda F: F.binary_cross_entropy_with_logits(t(2), y(0, 1)),
    "ce target": lambda F: F.cross_entropy(t(4, 3), y(0, 5, 1, 1)),
    "ce negative target": lambda F: F.cross_entropy(t(4, 3), y(0, -1, 1, 1), reduction="none"),
    "ce target smoothed": lambda F: F.cross_entropy(t(4, 3), y(0, 5, 1, 1), t(3), label_smoothing=0.1),
    "ce target trailing": lambda F: F.cross_entropy(t(1, 3, 2), y(0, 3)[None]),
    "ce unbatched target": lambda F: F.cross_entropy(t(3), torch.tensor(3)),
    "ce unbatched size": lambda F: F.cross_entropy(t(3), y(0, 1)),
    "ce batch": lambda F: F.cross_entropy(t(4, 3), y(0, 1, 2)),
    "ce multi-target": lambda F: F.cross_entropy(t(4, 3), y(0, 1, 2, 0)[:, None]),
    "ce int32": lambda F: F.cross_entropy(t(2, 3), y(0, 1).int()),
    "ce integer probabilities": lambda F: F.cross_entropy(t(2, 3), torch.ones(2, 3, dtype=torch.long)),
    "ce float classes": lambda F: F.cross_entropy(t(2, 3), t(2)),
    "ce smoothing": lambda F: F.cross_entropy(t(2, 3), y(0, 1), label_smoothing=1.5),
    "ce smoothing of probabilities": lambda F: F.cross_entropy(t(2, 3), t(2, 3), label_smoothing=1.5),
    "ce ignore_index of probabilities": lambda F: F.cross_entropy(t(2, 3), t(2, 3), ignore_index=1),
    "ce weight size": lambda F: F.cross_entropy(t(2, 3), y(0, 1), t(2)),
    "ce weight size of probabilities": lambda F: F.cross_entropy(t(2, 3), t(2, 3), t(2)),
    "ce weight dtype": lambda F: F.cross_entropy(t(2, 3), y(0, 1), t(3, dtype=torch.float64)),
    "ce weight needs a gradient": lambda F: F.cross_entropy(t(2, 3).requires_grad_(), y(0, 1), t(3).requires_grad_()),
    "ce reduction": lambda F: F.cross_entropy(t(2, 3), y(0, 1), reduction="max"),
    "ce no classes": lambda F: F.cross_entropy(t(2, 0), y(0, 0)),
    "linear shapes": lambda F: F.linear(t(2, 3), t(4, 2)),
    "linear 0-d": lambda F: F.linear(t(), t(4, 2)),
    "linear dtypes": lambda F: F.linear(t(2, 3), t(4, 3, dtype=torch.float64)),
    "linear bias": lambda F: F.linear(t(2, 3), t(4, 3), t(3)),
    "linear vector and bias": lambda F: F.linear(t(2, 3), t(3), t(1)),
    "rms_norm shape": lambda F: F.rms_norm(t(2, 3), (4,)),
    "rms_norm no shape": lambda F: F.rms_norm(t(2, 3), ()),
    "rms_norm long shape": lambda F: F.rms_norm(t(3), (2, 3)),
    "rms_norm number as shape": lambda F: F.rms_norm(t(2, 3), 3),
    "rms_norm weight": lambda F: F.rms_norm(t(2, 3), (3,), t(1)),
    "rms_norm integers": lambda F: F.rms_norm(y(1, 2), (2,)),
    "layer_norm shape": lambda F: F.layer_norm(t(2, 3), (4,)),
    "layer_norm number as shape": lambda F: F.layer_norm(t(2, 3), 3),
    "layer_norm weight": lambda F: F.layer_norm(t(2, 3), (3,), t(2)),
    "layer_norm bias": lambda F: F.layer_norm(t(2, 3), (3,), t(3), t(1)),
    "layer_norm dtypes": lambda F: F.layer_norm(t(2, 3), (3,), t(3, dtype=torch.float64)),
    "layer_norm dtypes of 16 bits": lambda F: F.layer_norm(t(2, 3).bfloat16(), (3,), t(3), t(3).bfloat16()),
    "layer_norm integers": lambda F: F.layer_norm(y(1, 2), (2,)),
    "layer_norm complex": lambda F: F.layer_norm(t(2, 3, dtype=torch.cfloat), (3,)),
    "group_norm groups": lambda F: F.group_norm(t(2, 3), 2),
    "group_norm no groups": lambda F: F.group_norm(t(2, 3), 0),
    "group_norm dimensions": lambda F: F.group_norm(t(2), 2),
    "group_norm of one number": lambda F: F.group_norm(t(1, 2), 2),
    "group_norm weight": lambda F: F.group_norm(t(2, 4), 2, t(3)),
    "group_norm bias": lambda F: F.group_norm(t(2, 4), 2, t(4), t(3)),
    "group_norm dtypes": lambda F: F.group_norm(t(2, 4), 2, t(4, dtype=torch.float64)),
    "softmax dim": lambda F: F.softmax(t(2, 3), 2),
    "softmax integers": lambda F: F.softmax(y(1, 2), 0),
    "log_softmax dim": lambda F: F.log_softmax(t(2, 3), -3),
    "log_softmax integers": lambda F: F.log_softmax(y(1, 2), 0),
    "gelu approximate": lambda F: F.gelu(t(2), approximate="erf"),
    "gelu integers": lambda F: F.gelu(y(1, 2)),
    "bce probabilities size": lambda F: F.binary_cross_entropy(t(3), t(1)),
    "bce probabilities reduction": lambda F: F.binary_cross_entropy(t(3), t(3), reduction="max"),
    "bce probabilities weight": lambda F: F.binary_cross_entropy(t(3), t(3), t(2)),
    "bce probabilities integers": lambda F: F.binary_cross_entropy(t(2), y(0, 1)),
    "bce probabilities input": lambda F: F.binary_cross_entropy(y(0.5, -0.1), y(0.5, 0.5)),
    "bce probabilities input above": lambda F: F.binary_cross_entropy(y(0.5, 1.1), y(0.5, 0.0), reduction="none"),
    "bce probabilities nan": lambda F: F.binary_cross_entropy(y(0.5, torch.nan), y(0.5, 0.0)),
    "bce probabilities target": lambda F: F.binary_cross_entropy(y(0.5, 0.5), y(0.5, 1.1), t(2), reduction="sum"),
    "kl reduction": lambda F: F.kl_div(t(3), t(3), reduction="max"),
    "kl shapes": lambda F: F.kl_div(t(3), t(4), reduction="sum"),
    "poisson reduction": lambda F: F.poisson_nll_loss(t(3), t(3), reduction="max"),
    "poisson shapes": lambda F: F.poisson_nll_loss(t(3), t(4)),
    "gaussian reduction": lambda F: F.gaussian_nll_loss(t(3), t(3), t(3), reduction="max"),
    "gaussian shapes": lambda F: F.gaussian_nll_loss(t(3), t(4), t(3)),
    "gaussian var": lambda F: F.gaussian_nll_loss(t(3), t(3), -t(3)),
    "gaussian negative number": lambda F: F.gaussian_nll_loss(t(3), t(3), -1.0),
    "gaussian var size": lambda F: F.gaussian_nll_loss(t(2, 3), t(2, 3), t(3)),
    "gaussian var dimensions": lambda F: F.gaussian_nll_loss(t(2, 3, 4), t(2, 3, 4), t(2, 1, 1)),
    "smooth_l1 beta": lambda F: F.smooth_l1_loss(t(3), t(3), beta=-1.0),
    "smooth_l1 reduction": lambda F: F.smooth_l1_loss(t(3), t(3), reduction="max"),
    "smooth_l1 shapes": lambda F: F.smooth_l1_loss(t(3), t(4)),
    "glu 0-d": lambda F: F.glu(t()),
    "glu odd": lambda F: F.glu(t(2, 3), -1),
    "glu dim": lambda F: F.glu(t(2, 4), 2),
    "glu integers": lambda F: F.glu(y(1, 2)),
    "silu integers": lambda F: F.silu(y(1, 2)),
    "mish integers": lambda F: F.mish(y(1, 2)),
    "elu integers": lambda F: F.elu(y(1, 2)),
    "softplus complex": lambda F: F.softplus(t(2, dtype=torch.cfloat)),
    "leaky_relu complex": lambda F: F.leaky_relu(t(2, dtype=torch.cfloat)),
    "logsigmoid integers": lambda F: F.logsigmoid(y(1, 2)),
    **{
        f"{name} in place of a leaf": lambda F, name=name: getattr(F, name)(t(2).requires_grad_(), inplace=True)
        for name in ("silu", "mish", "elu", "leaky_relu")
    },
    "relu complex": lambda F: F.relu(t(2, dtype=torch.cfloat)),
    "relu in place of a leaf": lambda F: F.relu(t(2).requires_grad_(), inplace=True),
}


#: Since which torch its text is that.
SAID_FROM = {"bce probabilities weight": "2.13"}


@pytest.mark.parametrize("case", EXCEPTIONS)
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_exception(case):
    """torch's type, torch's text first; a remedy may follow."""
    call = EXCEPTIONS[case]
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        call(F)
    with pytest.raises(theirs.type) as mine:
        call(ours)
    assert type(mine.value) is type(theirs.value)
    if torch.__version__ < SAID_FROM.get(case, ""):
        return
    text = str(theirs.value).split("\n")[0].rstrip(".")
    assert str(mine.value).startswith(text)


WARNINGS = {
    "mse sizes": lambda F: F.mse_loss(t(3, 1), t(3)),
    "l1 sizes": lambda F: F.l1_loss(t(3, 1), t(3)),
    "huber sizes": lambda F: F.huber_loss(t(3, 1), t(3)),
    "mse size_average": lambda F: F.mse_loss(t(3), t(2 + 1), False),
    "mse reduce": lambda F: F.mse_loss(t(3), t(3), None, False),
    "l1 reduce": lambda F: F.l1_loss(t(3), t(3), reduce=False),
    "bce size_average": lambda F: F.binary_cross_entropy_with_logits(t(3), t(3), None, False),
    "ce size_average": lambda F: F.cross_entropy(t(2, 3), y(0, 1), None, True),
    "ce reduce": lambda F: F.cross_entropy(t(2, 3), y(0, 1), reduce=False),
    "elementwise_mean": lambda F: F.mse_loss(t(3), 2 * t(3), reduction="elementwise_mean"),
    "huber elementwise_mean": lambda F: F.huber_loss(t(3), 2 * t(3), reduction="elementwise_mean"),
    "smooth_l1 sizes": lambda F: F.smooth_l1_loss(t(3, 1), t(3)),
    "smooth_l1 reduce": lambda F: F.smooth_l1_loss(t(3), 2 * t(3), reduce=False),
    "bce probabilities reduce": lambda F: F.binary_cross_entropy(t(3) / 2, t(3), reduce=False),
    "kl mean": lambda F: F.kl_div(t(2, 3), t(2, 3)),
    "kl size_average": lambda F: F.kl_div(t(2, 3), t(2, 3), size_average=False),
    "poisson size_average": lambda F: F.poisson_nll_loss(t(2, 3), t(2, 3), size_average=False),
    "softmax dim": lambda F: F.softmax(t(2, 3)),
    "log_softmax dim": lambda F: F.log_softmax(t(2, 3, 2)),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_warning(case):
    results = []
    for functions in (F, ours):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = WARNINGS[case](functions)
        results.append([(w.category, str(w.message)) for w in caught])
        results.append(value.tolist())
    assert results[:2] == results[2:]
    assert results[0]


def test_size_and_dim_warnings_point_to_the_caller():
    for call in (
        lambda: ours.mse_loss(t(3, 1), t(3)),
        lambda: ours.softmax(t(2, 3)),
        lambda: our_nn.Softmax()(t(2, 3)),
    ):
        with pytest.warns(UserWarning, match="target size|Implicit dimension") as caught:
            call()
        assert [w.filename for w in caught] == [__file__]


def test_elementwise_mean_has_the_gradient_of_mean():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.warns(UserWarning, match="deprecated"):
        ours.mse_loss(x, torch.zeros(2), reduction="elementwise_mean").backward()
    assert x.grad.tolist() == [1.0, 2.0]
