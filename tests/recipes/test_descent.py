"""The descent recipe: its curves are those of the textbook's recurrences, and its limits are where methods diverge."""

import math

import pytest
import torch
import yaml
from PIL import Image

from recipes.cli import RecipeCLI
from recipes.descent import METHODS, Descent, main
from recipes.descent_figures import Walk
from tests.recipes.conftest import ROOT, curves, events
from torchcalc.convergence import SURFACES

STEPS, FRAMES = 120, 4
LR = yaml.safe_load((ROOT / "configs/descent.yaml").read_text())["model"]["lr"]
# The textbook's functions and their gradients, written once more.
GRADIENTS = {
    "rosenbrock": lambda x, y: (-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)),
    "beale": lambda x, y: (
        sum(2 * (c - x + x * y**n) * (y**n - 1) for n, c in enumerate((1.5, 2.25, 2.625), 1)),
        sum(2 * (c - x + x * y**n) * n * x * y ** (n - 1) for n, c in enumerate((1.5, 2.25, 2.625), 1)),
    ),
    "himmelblau": lambda x, y: (
        4 * x * (x * x + y - 11) + 2 * (x + y * y - 7),
        2 * (x * x + y - 11) + 4 * y * (x + y * y - 7),
    ),
}


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A short run in this process: its CLI and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("descent"))
        short = [f"--model.steps={STEPS}", f"--model.frames={FRAMES}", "--model.sweep=[0.02, 0.5, 0.98, 1.02]"]
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        cli = RecipeCLI("descent", Descent, None, [*short, *quiet])
    return cli, folder / "runs/descent/version_0"


def walk(cli, surface, method, part=None):
    (found,) = (
        each
        for each in cli.model.walks
        if (each.surface, each.method) == (surface, method)
        and (not each.limit if part is None else each.limit and math.isclose(each.lr / each.limit, part))
    )
    return found


def recurrence(method, gradient, x, lr, steps):
    """The methods by their formulas, in plain Python."""
    path, m, v = [x], [0.0, 0.0], [0.0, 0.0]
    for t in range(1, steps + 1):
        g = gradient(*x)
        if method == "GD":
            step = g
        elif method in ("momentum", "Nesterov"):
            m = [0.9 * a + b for a, b in zip(m, g, strict=True)]
            step = m if method == "momentum" else [b + 0.9 * a for a, b in zip(m, g, strict=True)]
        elif method == "RMSprop":
            v = [0.99 * a + 0.01 * b * b for a, b in zip(v, g, strict=True)]
            step = [b / (math.sqrt(a) + 1e-8) for a, b in zip(v, g, strict=True)]
        else:
            m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
            v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g, strict=True)]
            step = [a / (1 - 0.9**t) / (math.sqrt(b / (1 - 0.999**t)) + 1e-8) for a, b in zip(m, v, strict=True)]
        x = [a - lr * b for a, b in zip(x, step, strict=True)]
        path.append(x)
    return torch.tensor(path, dtype=torch.float64)


def test_the_config_walks_every_method_down_every_surface():
    assert {surface: set(lr) for surface, lr in LR.items()} == {surface: set(METHODS) for surface in SURFACES}


@pytest.mark.parametrize("surface", GRADIENTS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "backtracking"])
def test_paths_are_the_recurrences(walked, surface, method):
    found = torch.stack(walk(walked[0], surface, method).path)
    expected = recurrence(
        method, GRADIENTS[surface], list(map(float, SURFACES[surface].start)), LR[surface][method], STEPS
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("surface", LR)
def test_backtracking_never_ascends(walked, surface):
    gaps = walk(walked[0], surface, "backtracking").gaps
    assert (gaps[1:] <= gaps[:-1]).all() and gaps[-1] < gaps[0] / 10


@pytest.mark.parametrize("method", METHODS)
def test_curves_are_the_paths(walked, method):
    cli, folder = walked
    by_tag = curves(folder / method)
    assert set(by_tag) == {f"gap_log10/{surface}" for surface in LR}
    for surface in LR:
        points = torch.stack(walk(cli, surface, method).path)
        expected = SURFACES[surface](points).clamp(min=1e-16).log10()  # the minima are 0
        steps, values = zip(*by_tag[f"gap_log10/{surface}"], strict=True)
        assert list(steps) == list(range(STEPS + 1))
        assert list(values) == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("method", "limit"), [("GD", 2 / 20), ("momentum", 2 * 1.9 / 20), ("Nesterov", 2 * 1.9 / (2.8 * 20))]
)
def test_limits_are_where_the_methods_diverge(walked, method, limit):
    cli, _ = walked
    sweep = [each for each in cli.model.sweep if each.method == method]
    assert [each.limit for each in sweep] == pytest.approx([limit] * len(sweep), rel=1e-4)
    assert [each.lr / each.limit for each in sweep] == pytest.approx([0.02, 0.5, 0.98, 1.02])
    assert [each.growth < 1 for each in sweep] == [True, True, True, False]


def test_growth_of_gradient_descent_is_that_of_the_slowest_eigenvalue(walked):
    for each in walked[0].model.sweep:
        if each.method == "GD":
            assert each.growth == pytest.approx(max(abs(1 - each.lr), abs(1 - 20 * each.lr)), rel=0.01)


def test_growth_of_an_oscillation():
    path = [torch.tensor([0.9**t * math.cos(t), 0.0]).double() for t in range(300)]
    assert Walk("bowl", "GD", 0.1, path=path).growth == pytest.approx(0.9, rel=1e-3)


@pytest.mark.parametrize(
    ("part", "manner"),
    [
        (0.02, "crawls"),
        (0.2, "walks"),
        (0.5, "stops in the valley, then walks"),
        (0.98, "overshoots, and arrives"),
        (1.02, "diverges"),
    ],
)
def test_manner(part, manner):
    """On the bowl (x² + 20y²)/2, from (1, 1): a step multiplies x by 1 − lr and y by 1 − 20·lr."""
    lr = 0.1 * part
    path = [torch.tensor([(1 - lr) ** t, (1 - 20 * lr) ** t]).double() for t in range(120)]
    assert Walk("bowl", "GD", lr, path=path).manner == manner


@pytest.mark.parametrize("setting", ["--model.sweep=[]", "--model.steps=29"])
def test_too_little_to_see(setting, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([setting])
    assert "give at least one part of the limit, and at least 30 steps" in capsys.readouterr().err


def test_table_is_printed_and_logged(walked):
    cli, folder = walked
    table = cli.model.report().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert len(rows) == len(cli.model.sweep)
    assert all(row[4] == row[5] for row in rows)  # predicted, seen
    assert {row[5] for row in rows} == {"converges", "diverges"}
    (text,) = events(folder).Tensors("learning_rate/sweep/text_summary")
    assert text.tensor_proto.string_val[0].decode() == cli.model.report()


def test_pictures(walked):
    _, folder = walked
    found = events(folder)
    expected = {f"{kind}/{surface}" for kind in ("contours", "movies") for surface in LR} | {"learning_rate/sweep"}
    assert set(found.Tags()["images"]) == expected
    for name in [*LR, "sweep"]:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width >= 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 100
    for surface in LR:
        with Image.open(folder / f"{surface}.gif") as movie:
            frames = set()
            for i in range(movie.n_frames):
                movie.seek(i)
                frames.add(movie.convert("RGB").tobytes())
            assert len(frames) == FRAMES
        assert found.Images(f"movies/{surface}")[0].encoded_image_string == (folder / f"{surface}.gif").read_bytes()


@pytest.mark.parametrize(
    ("lr", "says"),
    [
        ("{rosenbrok: {GD: 0.1}}", "there is no 'rosenbrok'; did you mean 'rosenbrock'?"),
        ("{beale: {adam: 0.1}}", "there is no 'adam'; did you mean 'Adam'?"),
    ],
)
def test_misspelt_names(lr, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([f"--model.lr={lr}"])
    assert says in capsys.readouterr().err


def test_one_surface_of_your_own_choice(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["--model.lr={beale: {Adam: 0.1}}", "--model.steps=30", "--model.sweep=[0.5]", "--trainer.logger=false"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("surface", LR)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "backtracking"])
def test_learning_rates_are_the_best_of_their_kind(surface, method):
    """What the config promises: of 1, 2 and 5 × 10ⁿ up to 1 none whose path stays in the picture ends lower after 300 steps."""
    f, ends = SURFACES[surface], {}
    x0, x1, y0, y1 = f.bounds
    for lr in [float(f"{digit}e{n}") for n in range(-5, 0) for digit in (1, 2, 5)] + [1.0]:
        x = torch.nn.Parameter(torch.tensor(f.start).double())
        optimizer = METHODS[method]([x], lr=lr)
        for _ in range(300):
            optimizer.zero_grad()
            f(x).backward()
            optimizer.step()
            if not (x0 <= x[0] <= x1 and y0 <= x[1] <= y1):
                break
        else:
            ends[lr] = f(x.detach()).clamp(min=1e-16).item()
    assert ends[LR[surface][method]] == min(ends.values())
