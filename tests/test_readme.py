"""The READMEs are true: their code runs, their files exist, the index is complete."""

import re
from pathlib import Path

import pytest
import torch
from generator import ratios

import torchcalc

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
INDEX = (ROOT / "torchcalc" / "README.md").read_text()
SWAP = (ROOT / ".docs" / "pages" / "guides" / "swap.md").read_text()
FILES = [*(ROOT / name / "README.md" for name in (".", "benchmarks", "torchcalc")), ROOT / "CONTRIBUTING.md"]
PAGES = {path: path.read_text() for path in FILES}
BLOCKS = re.findall(r"^```python\n(.+?)^```", README, flags=re.MULTILINE | re.DOTALL)
LIGHTNING = re.search(r"^\*\*In Lightning\*\*.+?^```python\n(.+?)^```", SWAP, flags=re.MULTILINE | re.DOTALL)[1]


def run(block: str) -> dict[str, object]:
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    return names


def as_stock(block: str) -> str:
    """Swap the imports back to what the comments say that they were."""
    swapped = re.sub(r"^from torchcalc.*# was: (.+)$", r"\1", block, flags=re.MULTILINE)
    assert swapped != block
    return swapped


@pytest.fixture
def in_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")  # by Lightning
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")  # for data in memory
@pytest.mark.filterwarnings("ignore:The number of training batches")  # only the example's are so few
@pytest.mark.parametrize(("block", "learnt"), [(BLOCKS[0], "net"), (LIGHTNING, "model")], ids=["script", "lightning"])
def test_swapping_the_import_back_learns_the_same(block, learnt):
    ours, stock = run(block)[learnt], run(as_stock(block))[learnt]
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert p.grad is not None


def test_every_snippet_is_run():
    """By the test above; what else has Python is in the documentation, whose pages test_pages.py runs."""
    assert len(BLOCKS) == 1
    assert [path for path, text in PAGES.items() if "```python" in text] == [ROOT / "README.md"]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 80


def anchors(path: Path) -> set[str]:
    """What a page's headings are called in links, as GitHub and mkdocs do it."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    links = [(path, link) for path, text in PAGES.items() for link in re.findall(r"\]\(([^)]+)\)", text)]
    assert len(links) > 50
    for path, link in links:
        file, _, anchor = link.partition("#")
        if not file.startswith("https://"):
            place = path.parent / file if file else path
            assert place.exists(), (path, link)
            assert not anchor or anchor in anchors(place), (path, link)


def test_ratios_are_those_of_the_benchmarks():
    """Each number stands, rounded to as many digits, in a row of benchmarks/README.md that is about the same."""
    table = README.partition("| an H100 |\n|---|---|---|\n")[2].partition("\n\n")[0]
    rows = [row for _, _, rows in ratios.tables() for row in rows]
    for line in table.splitlines():
        label, *cells = line.strip("| ").split(" | ")
        names = set(re.findall(r"[A-Za-z_]{4,}", label)) - {"against", "elements", "fused", "with"}
        about = " ".join(" ".join(row[1:]) for row in rows if names & set(re.findall(r"\w+", row[0])))
        measured = [float(n) for n in re.findall(r"\d+\.\d+", about)]
        for number in re.findall(r"(?<![\d.,])\d+\.\d+", "; ".join(cells)):
            assert any(round(each, 1) == float(number) or each == float(number) for each in measured), (label, number)


def test_every_public_function_and_optimizer_is_in_the_table():
    table = re.findall(r"`(\w+)`", "".join(line for line in INDEX.splitlines() if line.startswith("|")))
    internal = {"Optimizer", "TensorList"}  # what optimizers are written with
    assert set(torchcalc.functional.__all__) | set(torchcalc.optim.__all__) - internal <= set(table)


@pytest.mark.usefixtures("in_empty_folder")
def test_settings_named_are_accepted():
    from recipes.digits import main

    guide = (ROOT / ".docs" / "pages" / "guides" / "dashboard.md").read_text()
    for settings in re.findall(r'make train ARGS="(.+?)"', README + guide):
        with pytest.raises(SystemExit) as end:
            main([*settings.split(), "--print_config"])
        assert end.value.code == 0
