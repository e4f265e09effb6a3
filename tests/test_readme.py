"""The READMEs are true: their code runs, their files exist, the index is complete."""

import re
from pathlib import Path

import pytest
import torch

import torchcalc

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
INDEX = (ROOT / "torchcalc" / "README.md").read_text()
SWAP = (ROOT / ".docs" / "pages" / "guides" / "swap.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / name / "README.md" for name in (".", "benchmarks", "torchcalc"))}
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


def test_the_report_is_as_shown():
    names = run(BLOCKS[1])
    shown = re.search(r"^```text\n(.+?)^```", README, flags=re.MULTILINE | re.DOTALL)[1]
    lines = str(names["report"]).splitlines()
    for line in shown.splitlines():
        assert any(each.startswith(line.removesuffix("...")) for each in lines), line
    assert len(lines) < 60  # one screen
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(names["SiLU"].apply, x)


def test_links_lead_somewhere():
    links = [(path, link) for path, text in PAGES.items() for link in re.findall(r"\]\(([^)#]+)\)", text)]
    assert len(links) > 50
    assert [link for path, link in links if not (path.parent / link).exists()] == []


def test_every_public_function_and_optimizer_is_in_the_table():
    table = re.findall(r"`(\w+)`", "".join(line for line in INDEX.splitlines() if line.startswith("|")))
    internal = {"Optimizer", "TensorList"}  # what optimizers are written with
    assert set(torchcalc.functional.__all__) | set(torchcalc.optim.__all__) - internal <= set(table)


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"`?make ([a-z-]+)", re.sub(r"make \.venv", "", README))) <= set(targets)


@pytest.mark.usefixtures("in_empty_folder")
def test_settings_named_are_accepted():
    from recipes.digits import main

    settings = re.search(r'make train ARGS="(.+?)"', README)[1].split()
    with pytest.raises(SystemExit) as end:
        main([*settings, "--print_config"])
    assert end.value.code == 0
