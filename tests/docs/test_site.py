"""The documentation builds without a warning, and explains every public name with every argument."""

import ast
import importlib
import inspect
import itertools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from generator import docstrings, figures, mathematics, public, ratios
from generator.pages import LIMITS

import torchcalc
from tests.test_completeness import OPTIMIZERS
from torchcalc import calculus, convergence, functional, optim
from torchcalc.convergence import stability_limit

ROOT = Path(__file__).resolve().parents[2]
NAMES = [(short, name) for short in public.NAMESPACES for name in importlib.import_module(f"torchcalc.{short}").__all__]
CALLABLE = [(short, name) for short, name in NAMES if callable(getattr(getattr(torchcalc, short), name))]
every_public_name = pytest.mark.parametrize(("short", "name"), CALLABLE)


def value_of(short: str, name: str):
    return getattr(getattr(torchcalc, short), name)


@every_public_name
def test_docstring_has_an_example_that_runs(short, name):
    """That it runs is pytest's --doctest-modules."""
    assert ">>> " in (value_of(short, name).__doc__ or "")


@every_public_name
def test_every_argument_is_explained(short, name):
    value = value_of(short, name)
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    assert [argument for argument, text in docstrings.arguments(value).items() if not text] == []


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "Linear", "LinearCrossEntropyLoss"])
def test_the_bias_of_a_module_is_whether_it_has_one(name):
    assert re.search("learn", docstrings.arguments(getattr(torchcalc.nn, name))["bias"])


@pytest.mark.parametrize(("short", "name"), [each for each in CALLABLE if not inspect.isclass(value_of(*each))])
def test_the_page_of_a_function_shows_every_argument(short, name):
    """A module's page has a table that gathers them; a function's shows its docstring alone."""
    value = value_of(short, name)
    shown = docstrings.entries(value.__doc__)
    assert [
        each for each in inspect.signature(value).parameters if not each.startswith("_") and each not in shown
    ] == []


def raises(function, calls: int = 1) -> bool:
    """Whether its own lines raise, or those of what they call in this package."""
    function = inspect.unwrap(function)
    if not inspect.isfunction(function) or function.__code__.co_filename == "<string>":  # a dataclass's
        return False
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    if any(isinstance(node, ast.Raise) and node.exc is not None for node in nodes):
        return True
    called = (node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    known = (function.__globals__.get(name) for name in called)
    ours = (each for each in known if inspect.isfunction(each) and each.__module__.startswith("torchcalc."))
    return calls > 0 and any(raises(each, calls - 1) for each in ours)


@every_public_name
def test_errors_are_explained(short, name):
    """What its own lines raise and those that they call; a class's are those of its constructor."""
    value = value_of(short, name)
    of = value.__dict__.get("__init__") if inspect.isclass(value) else value
    if raises(of) and short != "nn":  # a module's are its function's and torch's
        assert re.search(r"^\s*Raises( \(when called\))?[:,]", value.__doc__ or "", re.MULTILINE)


@pytest.mark.parametrize("name", functional.__all__)
def test_shapes_and_dtypes_are_said(name):
    args, _, returns = getattr(functional, name).__doc__.partition("Returns:")
    assert re.search(r"\bshapes?\b|\bdimensions?\b|``\(", args), "of the arguments"
    assert re.search(r"\bshapes?\b|\bsize\b|0-d|``\(|like", returns), "of the result"
    assert "dtype" in args


@pytest.mark.parametrize("name", [*calculus.__all__, *convergence.__all__])
def test_shapes_are_said_of_what_takes_tensors(name):
    value = getattr(calculus, name, None) or getattr(convergence, name)
    if inspect.isfunction(value) and re.search("Tensor|Callable|Function", str(inspect.signature(value))):
        assert re.search(r"shape|scalar|0-d|one element|\blike\b|\bnumber\b|\(n,\)", value.__doc__), name


SOURCED = [each for each in CALLABLE if each[0] in ("functional", "calculus", "convergence") or each[1] in OPTIMIZERS]


@pytest.mark.parametrize(("short", "name"), SOURCED)
def test_source_is_named(short, name):
    """A paper in its docstring or its file's; where there is none to name, torch's function of that name."""
    value = value_of(short, name)
    text = value.__doc__ + sys.modules[value.__module__].__doc__
    assert re.search(r"References?:|arXiv:|doi:|as ``torch\.|by the textbook|as the textbook", text)


def test_every_function_and_optimizer_has_a_figure():
    linear = {"layers/linear", "layers/embedding", "layers/dropout"}  # whose slopes are constants
    pages = {file.uri.removeprefix("reference/").removesuffix(".md") for file in public.files() if file.functions}
    families = ("activations/", "layers/", "losses/")
    assert {page for page in pages if page.startswith(families)} - linear == set(figures.CURVES)
    assert set(figures.SETTINGS) == OPTIMIZERS


@pytest.mark.parametrize("page", figures.CURVES)
def test_curves_are_a_function_and_its_slopes(page):
    """The second curve is the slope of the first, the third of the second, by differences, but for kinks."""
    for curve in figures.CURVES[page]:
        x, *values = figures.derivatives(curve)
        for y, slope in itertools.pairwise(values):
            secant = y.diff() / x.diff()
            error = (secant - (slope[1:] + slope[:-1]) / 2).abs()
            assert (error < 0.02 * (1 + slope.abs().max())).double().mean() > 0.97


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_path_descends(name):
    _, losses = figures.descend(name)
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize("name", LIMITS)
def test_limit_shown_is_the_limit(name):
    """The formula of the page, evaluated, is what stability_limit says."""
    optimizer = getattr(optim, name)([torch.nn.Parameter(torch.zeros(1))])
    group, sharpness = optimizer.param_groups[0], 3.0
    beta = group.get("betas", (0.0,))[0]
    numbers = {
        "λ": sharpness,
        "β₁": beta,
        "ω": group.get("weight_decay", 0.0),
        "τ": group.get("dampening", 0.0),
        "μ": beta * (1 - 0.5 * 0.96 ** group["momentum_decay"]) if name == "NAdam" else group.get("momentum", 0.0),
    }
    text = LIMITS[name].partition(",")[0].replace("−", "-").replace("·", "*").replace("2μβ₁", "2*μ*β₁")
    for symbol, number in numbers.items():
        text = text.replace(symbol, f"({number})")
    text = re.sub(r"(?<=[\d)])\(", "*(", text)
    assert eval(text) == pytest.approx(stability_limit(optimizer, sharpness))


def test_optimizers_without_a_limit_have_none():
    for name in OPTIMIZERS - set(LIMITS):
        with pytest.raises(TypeError, match="no stability limit is known"):
            stability_limit(getattr(optim, name)([torch.nn.Parameter(torch.zeros(1))]), 1.0)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("y' = 1 - y²", "<i>y</i>&#x27; = 1 - <i>y</i>²"),
        (
            "e^(x_k)/Σⱼ e^(x_j)",
            "<i>e</i><sup><i>x</i><sub><i>k</i></sub></sup>/Σⱼ <i>e</i><sup><i>x</i><sub><i>j</i></sub></sup>",
        ),
        ("P^-½HP^-½", "<i>P</i><sup>-½</sup>HP<sup>-½</sup>"),
        ("Hv_k·v_{k+1}", "<i>H</i><i>v</i><sub><i>k</i></sub>·<i>v</i><sub><i>k</i>+1</sub>"),
        ("max_norm < 1", "max_norm &lt; 1"),
        ("e^βx/β", "<i>e</i><sup><i>β</i><i>x</i></sup>/<i>β</i>"),
        ("(Jg)_k·ℓ_i", "(Jg)<sub><i>k</i></sub>·<i>ℓ</i><sub><i>i</i></sub>"),
    ],
)
def test_formula(text, html):
    assert mathematics.formula(text) == html


def test_text_leads_to_its_equations():
    made = mathematics.markdown("By (1) and (3), as arXiv:1606.08415 has it,\n\n    y = x².      (1)")
    assert "[(1)](#eq-1) and (3)" in made
    assert 'id="eq-1"' in made
    assert "https://arxiv.org/abs/1606.08415" in made


def test_who_found_it_is_no_part_of_the_formula():
    name, what, rest = mathematics.title("Softplus:  y = log(1 + x).     Dugas, Bengio 2001\n\nDerivation.")
    assert (name, what) == ("Softplus", "y = log(1 + x)")
    assert rest == "Derivation.\n\nReference: Dugas, Bengio 2001."


def test_a_row_of_a_table_goes_on_in_the_next_line():
    assert "| a | one two |\n| b | three |" in mathematics.markdown(
        "====  ====\na     one\n      two\nb     three\n====  ===="
    )


def test_each_error_and_each_argument_has_a_line():
    doc = docstrings.one_error_a_line("X.\n\nRaises:\n    TypeError: of a. ValueError: of b.\n")
    assert "TypeError: of a.\n    ValueError: of b." in doc
    assert "    a: both.\n    b: both." in docstrings.apart("X.\n\nArgs:\n    a, b: both.\n")


def test_ratios_are_the_readmes():
    rows = ratios.ratios(["tanh"])
    assert re.search(r"^\| tanh \|( [\d.]+ \|){4}$", rows, re.MULTILINE)
    assert "silu |" not in rows


def test_the_prose_of_the_benchmarks_names_what_is_short_of_stock():
    """Each row below 0.97, in what is said of its machine beside the words "short of stock": by name and number."""
    cpu, mark, gpu = ratios.TABLES.read_text().partition("On an H100")
    assert mark
    assert len(ratios.slower(100)) > 80
    for machine, label, ratio in ratios.slower(0.97):
        paragraphs = (gpu if "H100" in machine else cpu).split("\n\n")
        text = "".join(each for each in paragraphs if "short of stock" in each.lower())
        assert re.search(rf"\b{re.match('[a-z_]+', label)[0]}\b", text), (machine, label)
        assert f"{ratio:.2f}" in text, (machine, label, ratio)


@pytest.mark.slow
def test_site_builds_without_a_warning_and_has_every_name(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ".docs/mkdocs.yml"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in public.files():
        page = (tmp_path / file.uri).with_suffix(".html").read_text()
        for name in file.names:
            assert f'id="{file.module}.{name}"' in page, name
    for picture in [*figures.SETTINGS, *(key.rpartition("/")[2] for key in figures.CURVES)]:
        assert (tmp_path / "reference/figures" / f"{picture}.svg").stat().st_size > 1000
