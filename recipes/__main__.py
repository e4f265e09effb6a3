"""Run a recipe by name: ``python -m recipes digits [fit | validate | test] [--key=value ...]``."""

import ast
import importlib
import sys
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def listing(names: list[str]) -> str:
    """The recipes with the first line of what they say about themselves, without importing them."""
    sources = {name: Path(__file__).with_name(f"{name}.py").read_text() for name in names}
    about = {name: (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0] for name, source in sources.items()}
    rows = "\n".join(f"  {name:<15} {line}" for name, line in about.items())
    return f"usage: python -m recipes NAME [--setting=value ...]; NAME --help shows its settings\n\n{rows}"


def main(argv: list[str]) -> None:
    """Hand the arguments after the recipe's name to the recipe's own ``main``."""
    known = sorted(config.stem for config in CONFIGS.glob("*.yaml"))
    if argv and argv[0] in ("-h", "--help"):
        print(listing(known))
        return
    from recipes.errors import closest, fail  # with torch and Lightning: the list above need not wait for them

    if not argv:
        fail(f"no recipe given; recipes are: {', '.join(known)}")
    if argv[0] not in known:
        meant = closest(argv[0], known)
        remedy = f"did you mean {meant!r}? " if meant else ""
        fail(f"there is no recipe {argv[0]!r}; {remedy}recipes are: {', '.join(known)}")
    try:
        importlib.import_module(f"recipes.{argv[0]}").main(argv[1:])
    except KeyboardInterrupt:  # before or after what the trainer does, which says more
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
