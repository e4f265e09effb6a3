"""The checkpoint that ``--ckpt_path`` names: found, and known to fit before anything is written."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.errors import fail
from torchcalc.resume import is_complete

WORDS = ("best", "last")  # of the newest run that has checkpoints


def newest(folder: Path, word: str) -> Path | None:
    """The best or last checkpoint of the newest run in ``folder``: the file of that name, or else the newest complete file."""
    files = [file for file in folder.glob("*/checkpoints/*.ckpt") if is_complete(file)]
    files.sort(key=lambda file: file.stat().st_mtime)
    files = [file for file in files if file.parent == files[-1].parent]
    return next((file for file in files if file.stem == word), files[-1]) if files else None


def killed_before(path: Path, folder: Path) -> Path | None:
    """A run that began to train when the checkpoint was there already, and has none."""
    begun = {config.stat().st_mtime: config.parent for config in folder.glob("*/config.yaml")}
    at, run = max(begun.items(), default=(0.0, path))
    return run if at > path.stat().st_mtime and not any(map(is_complete, run.glob("checkpoints/*.ckpt"))) else None


def find(given: str, folder: Path) -> Path:
    """The file that ``--ckpt_path`` means, or the folder of pieces, where ``folder`` holds the recipe's runs."""
    path = newest(folder, given) if given in WORDS else Path(given)
    if path is None:
        fail(f"ckpt_path: {given!r} is that of the newest run, but no run in {str(folder)!r} has a checkpoint")
    if given == "last" and (run := killed_before(path, folder)):
        fail(
            f"ckpt_path: the newest run, {str(run)!r}, ended before it saved a checkpoint: leave ckpt_path out to begin "
            f"again; that of the run before is {str(path)!r}"
        )
    if not path.is_file() and not (path.is_dir() and is_complete(path)):
        fail(f"ckpt_path: there is no file {str(path)!r}")
    return path


def read(path: Path, recipe: str, weights_only: bool) -> dict[str, Any]:
    """The checkpoint's content, if it is one of Lightning's, and this recipe's as far as it says whose it is."""
    if not is_complete(path):
        fail(f"ckpt_path: {str(path)!r} is no checkpoint, or was cut short")
    try:
        # Of a checkpoint in pieces, what is not one.
        checkpoint = torch.load(
            path / "meta.pt" if path.is_dir() else path, map_location="cpu", weights_only=weights_only
        )
    except Exception as error:  # whatever unpickling it does
        if "Unsupported global" in str(error):
            fail(f"ckpt_path: {str(path)!r} holds more than tensors and numbers; if you trust it: --weights_only=false")
        fail(f"ckpt_path: {str(path)!r} is no checkpoint: {type(error).__name__}: {' '.join(str(error).split())}")
    needed = {"pytorch-lightning_version"} | ({"state_dict"} if path.is_file() else set())
    if not isinstance(checkpoint, dict) or not needed <= set(checkpoint):
        fail(f"ckpt_path: {str(path)!r} is no checkpoint of Lightning; those of a run lie in its folder checkpoints")
    if (other := checkpoint.get("recipe", recipe)) != recipe:
        fail(f"ckpt_path: {str(path)!r} is of the recipe {other!r}, and this is {recipe!r}")
    return checkpoint


def compare(path: Path, checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Refuse a checkpoint whose tensors are not those of the model, in one line that names the first difference."""
    saved = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name in dict.fromkeys([*here, *saved]) if saved.get(name) != here.get(name)]
    if wrong:
        there, ours = (f"of shape {of[wrong[0]]}" if wrong[0] in of else "missing" for of in (saved, here))
        fail(
            f"ckpt_path: {wrong[0]} is {there} in {str(path)!r}, and {ours} in this model; {len(wrong)} of {len(here)} "
            "tensors differ: leave the model's settings as they were"
        )
