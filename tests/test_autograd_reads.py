"""What a Function reads besides its arguments is seen by torch.compile to change, or not compiled: never a stale value."""

import enum
import math
import random
import subprocess
import sys
from functools import partial

import numpy
import pytest
import torch
from torch.func import grad, jacfwd, vmap
from torch.testing import assert_close

from torchcalc import functional
from torchcalc._dynamo import Unguarded, _readers
from torchcalc.autograd import Function
from torchcalc.formula import pointwise

compile = partial(torch.compile, backend="aot_eager")


@pytest.fixture(autouse=True)
def reset():
    torch._dynamo.reset()
    change(3.0)


class Mode(enum.Enum):
    A = 3.0
    B = 7.0


class Config:
    number = 3.0
    numbers = [3.0]  # noqa: RUF012


number, numbers, tensor, mode = 3.0, [3.0], torch.tensor(3.0), Mode.A


def change(value):
    global number, mode
    number = Config.number = value
    numbers[0] = Config.numbers[0] = value
    tensor.fill_(value)
    mode = Mode(value)
    enclosed(value)


def enclose():
    number, numbers = 3.0, [3.0]

    def set_(value):
        nonlocal number
        number = value
        numbers[0] = value

    return (lambda x: x * number), (lambda x: x * numbers[0]), set_


by_cell, by_cells_list, enclosed = enclose()


def define(forward, **methods):
    members = {"forward": forward, "backward": lambda ctx, g: 5 * g, "jvp": lambda ctx, t: 5 * t, **methods}
    return type("Reads", (Function,), {k: staticmethod(f) for k, f in members.items()}).apply


def helper(x):
    return x * number


def helper_of_list(x):
    return x * numbers[0]


inner, inner_of_list = define(lambda x: x * number), define(lambda x: x * numbers[0])


class Inner(Function):
    forward = staticmethod(helper_of_list)
    backward = staticmethod(lambda ctx, g: g)


SEEN = {  # compiled, with guards
    "global": define(lambda x: x * number),
    "closure": define(by_cell),
    "enum": define(lambda x: x * (3.0 if mode is Mode.A else 7.0)),
    "helper": define(lambda x: helper(x)),
    "partial": define(lambda x: partial(helper)(x)),
    "comprehension": define(lambda x: sum([x * number for _ in range(1)])),
    "beside what is pure": define(lambda x: x * math.pi * number / math.pi),
    "another Function": define(lambda x: inner(x) * 1),
    "formula": pointwise("Reads", lambda x: x * number, lambda x: 1),
}
REFUSED = {  # the graph breaks: (function, what it says with fullgraph)
    "list": (define(lambda x: x * numbers[0]), r"Reads.forward reads numbers, of type list"),
    "closure": (define(by_cells_list), r"Reads.forward reads numbers, of type list"),
    "class attribute": (define(lambda x: x * Config.numbers[0]), r"Reads.forward reads Config.numbers, of type list"),
    "tensor": (define(lambda x: x * tensor), r"Reads.forward reads tensor, of type Tensor"),
    "helper": (define(lambda x: helper_of_list(x)), r"Reads.forward reads numbers, of type list"),
    "default": (define(lambda x, numbers=numbers: x * numbers[0]), r"has a default argument of type list"),
    "another Function": (define(lambda x: inner_of_list(x) * 1), r"reads numbers, of type list"),
    "another Function's apply": (define(lambda x: Inner.apply(x) * 1), r"reads numbers, of type list"),
    "setup_context": (
        define(lambda x: x * number, setup_context=lambda ctx, inputs, output: numbers[0]),
        r"Reads.setup_context reads numbers",
    ),
    "backward": (define(lambda x: x * number, backward=lambda ctx, g: g * numbers[0]), r"Reads.backward reads numbers"),
    "NumPy": (define(lambda x: torch.from_numpy(numpy.multiply(x.numpy(), number))), r"reads numpy.multiply"),
    "item": (define(lambda x: x * tensor.clone().item()), r"reads tensor"),
    "item of an input": (define(lambda x: x * (x * 0 + number)[0].item()), r"calls .item\(\)"),
    "random": (define(lambda x: x * number + 0 * random.random()), r"uses random.random"),
}
if torch.__version__ >= "2.13":
    SEEN["class attribute"] = define(lambda x: x * Config.number)
else:  # stock torch.compile sees none of them change
    REFUSED["number of a class"] = (
        define(lambda x: x * Config.number),
        r"Reads.forward reads Config.number, a class attr",
    )


@pytest.mark.parametrize("what", SEEN)
def test_a_constant_is_guarded(what):
    f, x = compile(lambda x: SEEN[what](x), fullgraph=True), torch.ones(2)
    for value in (3.0, 7.0):
        change(value)
        assert_close(f(x), value * x)


@pytest.mark.parametrize("what", REFUSED)
def test_anything_else_breaks_the_graph(what):
    function, text = REFUSED[what]
    f, x = compile(lambda x: function(x * 1) * 1), torch.ones(2)
    for value in (3.0, 7.0):
        change(value)
        assert_close(f(x), value * x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{text}.*pass it as an argument"):
        compile(lambda x: function(x), fullgraph=True)(x)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # Dynamo, wherever a graph breaks
def test_a_derivative_is_not_lost_where_the_graph_breaks():
    function, x = REFUSED["list"][0], torch.ones(2)
    leaf = x.clone().requires_grad_()
    compile(lambda x: function(2 * x).sum())(leaf).backward()
    assert_close(leaf.grad, 10 * x)
    for transform in (grad, jacfwd, lambda f: vmap(grad(f))):
        z = x.expand(2, 2) if transform not in (grad, jacfwd) else x
        assert_close(compile(transform(lambda x: function(x).sum()))(z), 5 * torch.ones_like(z))


def test_a_name_that_is_defined_after_the_first_trace():
    f = compile(define(lambda x: x * later), fullgraph=True)  # noqa: F821
    globals()["later"] = 2.0
    assert_close(f(torch.ones(2)), 2 * torch.ones(2))
    globals()["later"] = 3.0
    assert_close(f(torch.ones(2)), 3 * torch.ones(2))
    del globals()["later"]


def test_no_function_of_ours_reads_what_may_change():
    assert functional.__all__
    classes = list(Function.__subclasses__())
    for cls in classes:
        classes += cls.__subclasses__()
        if cls.__module__.startswith("torchcalc.") and cls.__name__ != "Reads":
            try:
                assert not _readers(cls), cls
            except Unguarded as found:
                pytest.fail(f"{cls}{found}")


@pytest.mark.slow
def test_guards_of_a_function_compiled_first_in_a_process():
    code = """
import torch
from torchcalc.autograd import Function
number = 3.0
class Times(Function):
    @staticmethod
    def forward(x):
        return x * number
f = torch.compile(lambda x: Times.apply(x), fullgraph=True, backend="eager")
for number in (3.0, 7.0):
    assert f(torch.ones(())) == number
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
