"""What was forgotten has a name: each list of our functions, modules and optimizers is compared with what there is.

The lists that one function's own tests need are checked beside these: its row and test file in test_functional.py, its
module's cases in test_nn.py, an optimizer's row in optim/test_optimizer.py, torchcalc/README.md's table in test_readme.py.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import torchcalc.activations
import torchcalc.layers
import torchcalc.losses
from benchmarks import functions as benchmarks
from tests.optim.cases import TWINS
from tests.testing import right, test_optimizer_defects
from torchcalc import functional, nn, optim
from torchcalc.convergence import stability
from torchcalc.testing.optimizers import textbook

FAMILIES = (torchcalc.activations, torchcalc.layers, torchcalc.losses)
#: What functions are made with; no file of a function.
HELPERS = {"by_classes", "head", "inplace", "reduction", "residual"}
FILES = [
    f"{family.__name__}.{file.name}"
    for family in FAMILIES
    for file in pkgutil.iter_modules(family.__path__)
    if file.name not in HELPERS
]
OPTIMIZERS = {
    cls.__name__
    for cls in (getattr(optim, name) for name in optim.__all__)
    if issubclass(cls, optim.Optimizer) and cls is not optim.Optimizer
}


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_defines_is_in_the_index(name):
    file = importlib.import_module(name)
    for public in file.__all__:
        value = getattr(file, public)
        index = nn if inspect.isclass(value) else functional
        assert getattr(index, public, None) is value, public
    defined = {n for n, x in vars(file).items() if inspect.isclass(x) and issubclass(x, torch.nn.Module)}
    assert {n for n in defined if getattr(file, n).__module__ == name} <= set(file.__all__)


def test_every_function_is_among_those_that_the_checks_must_find_right():
    assert set(functional.__all__) <= {row.name.split()[1] for row in right.TORCHCALC}


def test_every_optimizer_is_among_those_that_the_checks_must_find_right():
    checked = {cls.__name__ for cls, *_ in test_optimizer_defects.RIGHT if cls.__module__.startswith("torchcalc.")}
    assert checked == OPTIMIZERS


def test_every_optimizer_has_a_stability_limit_or_is_known_to_have_none():
    none = {"RAdam", "Adamax", "Adadelta", "ASGD", "Rprop", "Lion"}  # of which no linear recurrence was derived
    known = {cls for cls in stability._KNOWN if cls.__module__.startswith("torchcalc.")}
    assert {cls.__name__ for cls in known} == OPTIMIZERS - none
    assert {case.twin for case in TWINS if case.cls in known} == set(stability._KNOWN) - known


def test_every_optimizer_has_a_textbook_rule_or_is_known_to_have_none():
    none = {
        "RAdam",
        "NAdam",
        "Adamax",
        "Adadelta",
        "ASGD",
        "Rprop",
        "GradientDescent",
    }  # compared with torch's, or SGD's rule
    assert {family for family, *_ in textbook.FAMILIES} == OPTIMIZERS - none


def test_every_function_has_a_benchmark():
    elsewhere = {
        "swiglu",
        "geglu",
        "glu",
        "linear",
        "reglu",
        "mlp",
        "gated_mlp",
        "embedding",
        "dropout",
        "scaled_dot_product_attention",
        "rms_norm",
        "add_rms_norm",
        "layer_norm",
        "group_norm",
        "softmax",
        "log_softmax",
        "cross_entropy",
        "linear_cross_entropy",
    }  # rows of their own, or torch's
    assert {*benchmarks.UNARY, *benchmarks.LOSSES} == set(functional.__all__) - elsewhere


def test_the_changelog_names_every_function_and_optimizer():
    words = set(re.findall(r"\w+", (Path(__file__).parents[1] / "CHANGELOG.md").read_text()))
    assert {*functional.__all__, *OPTIMIZERS} <= words
