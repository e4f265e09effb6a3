"""An exact resume where Lightning reads the checkpoint too early or too late: before the dtype, after the loaders."""

import pytest
import torch

from tests.instruments.test_exact_resume import POINTS, Killed, Module, train
from tests.same import same


@pytest.mark.parametrize("loader", ["ours", "shuffled", "stream"])
def test_loaders_made_before_the_checkpoint_is_read(loader, tmp_path, monkeypatch):
    """As by a schedule that asks how many steps there will be."""
    configure = Module.configure_optimizers

    def asks(self):
        assert self.trainer.estimated_stepping_batches
        return configure(self)

    monkeypatch.setattr(Module, "configure_optimizers", asks)
    check(tmp_path, loader)


def test_weights_wider_than_the_module_was(tmp_path):
    """The module is of float32 when Lightning loads its weights, and of float64 when it trains."""

    class Wide(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step([x.double() for x in batch], batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step([x.double() for x in batch], batch_idx)

    weights = check(tmp_path, "shuffled", Wide, precision="64-true")["weights"]
    assert weights["net.0.weight"].dtype == torch.float64


def check(folder, loader, module=Module, **options):
    whole = train(folder / "whole", loader, module(), **options)
    with pytest.raises(Killed):
        train(folder / "killed", loader, module(lambda *at: at == POINTS["mid-epoch"]), **options)
    same(train(folder / "killed", loader, module(), "last", **options), whole)
    return whole
