"""What a recipe prints: its report, and not what Lightning tells others than the user."""

import logging
import warnings
from pathlib import Path

from lightning.fabric.utilities.warnings import PossibleUserWarning


def say(rows: list[tuple[str, str]]) -> None:
    """Print a table of two columns below an empty line."""
    width = max((len(what) for what, _ in rows), default=0)
    print("\n" + "\n".join(f"{what:<{width}}  {value}" for what, value in rows))


def short(path: str | Path) -> str:
    """Return ``path`` as one types it here: relative where it lies below the working directory."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def tidy_output() -> None:
    """Silence what Lightning prints for others than the user: its own debts to torch, and advertisements."""
    warnings.filterwarnings(
        "ignore",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        FutureWarning,
        r"lightning\.pytorch\.utilities\._pytree",
    )
    # Workers would only cost here: the recipes' data lie in memory.
    warnings.filterwarnings("ignore", r"The '\w+_dataloader' does not have many workers", PossibleUserWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_no_advertisement)


def is_no_advertisement(record: logging.LogRecord) -> bool:
    """Tell Lightning's messages about the run from those about its makers' services."""
    return "Tip: " not in str(record.msg)
