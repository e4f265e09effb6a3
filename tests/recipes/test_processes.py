"""Two processes over gloo train a recipe as one does, at the same global batch."""

from pathlib import Path

import pytest
import torch

from tests.recipes.conftest import brief, curves, run_recipe

QUIET = "--trainer.enable_progress_bar=false"
STRATEGIES = {
    "ddp": ["--trainer.strategy=ddp"],
    "fsdp2": [
        "--trainer.strategy=ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1",
    ],
}
CASES = [("digits", "ddp"), ("language_model", "ddp"), ("language_model", "fsdp2")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_two_processes_as_one(name, strategy, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    settings = [*brief(name), "--trainer.accelerator=cpu", QUIET]
    one = run_recipe(tmp_path / "one", *settings)
    two = run_recipe(tmp_path / "two", *settings, "--trainer.devices=2", *STRATEGIES[strategy])
    if strategy == "ddp":  # FSDP2 saves by torch.distributed.checkpoint, which warns that it replaces best.ckpt
        assert "warning" not in two.stderr.lower(), two.stderr
    runs = [each.folder / "runs" / name / "version_0" for each in (one, two)]
    before, after = map(curves, runs)
    for tag in [tag for tag in before if tag.startswith(("loss/val", "loss/test", "accuracy"))]:
        assert [step for step, _ in after[tag]] == [step for step, _ in before[tag]]
        assert [value for _, value in after[tag]] == pytest.approx([value for _, value in before[tag]], rel=1e-4), tag
    if strategy == "ddp":
        # Sums in another order; Adam divides by the gradient's size, which lets that show.
        torch.testing.assert_close(weights(runs[1]), weights(runs[0]), rtol=1e-3, atol=1e-4)
    assert two.stdout.count("TensorBoard ") == 1  # one process reports
    again = run_recipe(tmp_path / "two", name, QUIET, "--ckpt_path=last")  # with the run's own settings
    assert "warning: no step was made: the checkpoint has all" in again.stderr
    assert [run.name for run in (tmp_path / "two/runs" / name).iterdir()] == ["version_0"]
