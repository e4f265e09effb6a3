"""The recipes' command line: errors in one line, and a help that begins with the recipe's own settings."""

import json
import re
import shlex
from argparse import Action
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from recipes.errors import debugging, fail, one_line

COMMANDS = {  # a command line without one trains
    "fit": "train, test the best checkpoint, say where everything lies",
    "validate": "measure the checkpoint that --ckpt_path names on the validation set",
    "test": "measure it on the test set",
}
LAST = ("trainer",)  # groups of settings that are the same in every recipe


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's, without the hundreds of classes that a setting could name; it keeps a description's lines."""

    def _get_help_string(self, action: Action) -> str:
        said = super()._get_help_string(action)
        return re.sub(r"(, default: %\(default\)s)?, known subclasses: .*(?=\)$)", "", said, flags=re.DOTALL)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


def typed(value: Any) -> str:
    """A setting's value as one types it in a shell.

    >>> typed((0.9, 0.999)), typed(True), typed("mean")
    ("'[0.9,0.999]'", 'true', 'mean')
    """
    return shlex.quote(value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str))


class Parser(LightningArgumentParser):
    """LightningArgumentParser whose errors take one line, and whose help says first what the recipe can be told."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        fail(one_line(message, parser.keys(), COMMANDS))

    def values(self) -> dict[str, Any]:
        """Every setting under the name that the command line takes, with its value in the recipe's config.

        A class stands under the name of the setting, its arguments below it: optimizer, optimizer.lr.
        """
        found: dict[str, Any] = {}

        def visit(key: str, value: Any) -> None:
            if isinstance(value, Namespace) and "class_path" in value:
                found[key] = value.class_path
                for name, argument in vars(value.get("init_args") or Namespace()).items():
                    visit(f"{key}.{name}", argument)
            elif isinstance(value, Namespace):
                for name, member in vars(value).items():
                    visit(f"{key}.{name}" if key else name, member)
            elif not isinstance(value, list) or not any(isinstance(each, Namespace) for each in value):
                found[key] = value

        visit("", self.get_defaults())
        return {key: value for key, value in found.items() if not key.startswith("__")}

    def keys(self) -> list[str]:
        """The settings' names."""
        return list(dict.fromkeys([*(action.dest for action in self._actions), *self.values()]))

    def format_help(self, *args: Any) -> str:
        """The recipe's description, its settings with their values, then all options, the trainer's last."""
        if not self._default_config_files:  # of all commands together
            return super().format_help(*args)
        own: list[Any] = []
        others: list[Any] = []
        for group in self._action_groups:
            keys = list(dict.fromkeys(action.dest.partition(".")[0] for action in group._group_actions))
            if keys:  # "default config file locations" has none: they stand above the values
                group.title = "checkpoint" if "ckpt_path" in keys else keys[0] if len(keys) == 1 else group.title
                (others if keys[0] in LAST else own).append(group)
        groups, about = self._action_groups, self.description
        config = Path(self._default_config_files[0])
        usual = {action.dest: action.default for action in self._actions if action.dest.partition(".")[0] in LAST}
        values = {key: value for key, value in self.values().items() if value is not None}
        ours = {key: value for key, value in values.items() if key.partition(".")[0] not in LAST}
        ours |= {key: value for key, value in values.items() if key in usual and value != usual[key]}
        lines = [
            *(f"{name:<9} {what}" for name, what in COMMANDS.items()),
            "",
            f"its settings, as {config.parent.name}/{config.name} and the defaults have them:",
            *(f"  --{key}={typed(value)}" for key, value in ours.items()),
        ]
        try:
            self._action_groups, self.description = own + others, "\n".join([about or "", "", *lines])
            return super().format_help(*args)
        finally:
            self._action_groups, self.description = groups, about
