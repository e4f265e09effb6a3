"""Run a recipe by name: ``python -m recipes digits [fit | validate | test] [--key=value ...]``."""

import importlib
import sys

from recipes.cli import CONFIGS
from recipes.errors import fail


def main(argv: list[str]) -> None:
    """Hand the arguments after the recipe's name to the recipe's own ``main``."""
    known = sorted(config.stem for config in CONFIGS.glob("*.yaml"))
    if not argv or argv[0] not in known:
        fail(f"{'no recipe given' if not argv else f'there is no recipe {argv[0]!r}'}; recipes are: {', '.join(known)}")
    importlib.import_module(f"recipes.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
