"""A recipe that ``kill -9`` ends at one point: ``python -m tests.recipes.killed POINT RECIPE [--setting=value ...]``."""

import io
import itertools
import os
import signal
import sys

import torch

from recipes.__main__ import main
from recipes.digits import Classifier

times = itertools.count()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_an_epoch(model, step=Classifier.training_step):
    def training_step(self, batch):
        loss = step(self, batch)
        if next(times) == 27:  # epochs have 17
            die()
        return loss

    model.training_step = training_step


def in_validation(model, step=Classifier.validation_step):
    def validation_step(self, batch):
        step(self, batch)
        if self.current_epoch == 1 and not self.trainer.sanity_checking:
            die()

    model.validation_step = validation_step


def while_a_checkpoint_is_written(model, save=torch.save):
    def half(content, file):
        if next(times) < 7:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    torch.save = half


if __name__ == "__main__":
    globals()[sys.argv[1]](Classifier)
    main(sys.argv[2:])
