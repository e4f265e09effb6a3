"""Make the README's pictures: ``python -m recipes.gallery`` runs three recipes and photographs TensorBoard.

Each is a screenshot of TensorBoard over a run with the recipe's own settings, in few colours: what git keeps is small.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from recipes.gallery.browser import Browser
from recipes.gallery.tensorboard import photograph, serve
from recipes.output import short

FOLDER = Path(__file__).resolve().parent
SIZE, SCALE = (1120, 940), 1.3
LARGEST = 150_000  # bytes

# What each picture shows: tags of the recipe of its name.
SHOWN = {
    "descent": ["contours/rosenbrock", "gap_log10/rosenbrock", "gap_log10/himmelblau", "learning_rate/sweep"],
    "depth": ["accuracy/200 layers", "first_gradient_log10/200 layers", "figures/depth", "figures/gradient_norm"],
    "learning_rate": ["figures/learning_rate", "figures/sharpness", "figures/range_test", "sweep/loss_log10"],
}


def main(names: list[str]) -> None:
    """Run the recipes, all if none is named, and save a picture of each."""
    for name in names or SHOWN:
        with tempfile.TemporaryDirectory() as folder, Browser(*SIZE, scale=SCALE) as page:
            quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
            environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
            subprocess.run([sys.executable, "-m", "recipes", name, *quiet], cwd=folder, env=environment, check=True)
            shot = Path(folder) / "page.png"
            with serve(Path(folder) / "runs" / name) as url:
                photograph(page, url, SHOWN[name], shot)
            picture, colours = FOLDER / f"{name}.png", 256
            while save(shot, picture, colours) > LARGEST:
                colours //= 2
        print(f"{short(picture)}: {picture.stat().st_size:,} bytes, {colours} colours")


def save(shot: Path, picture: Path, colours: int) -> int:
    """Save a screenshot with a palette of so many colours; return the file's size in bytes."""
    Image.open(shot).convert("RGB").quantize(colours).save(picture, optimize=True)
    return picture.stat().st_size


if __name__ == "__main__":
    main(sys.argv[1:])
