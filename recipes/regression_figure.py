"""The picture of recipe ``regression``: what it learned beside the closed form, what it predicts beside the truth."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from torchcalc.instruments.figures import COLOURS, new_figure

NAMES = [
    *("age", "sex", "body mass", "blood pressure", "cholesterol", "LDL", "HDL", "cholesterol / HDL", "triglycerides"),
    *("glucose", "intercept"),
]


def regression_figure(learned: Tensor, exact: Tensor, truth: Tensor, guess: Tensor) -> Figure:
    """Draw learned coefficients on top of the closed form's, and the predictions of a test set over the truth."""
    figure, (left, right) = new_figure(10, 4.5, columns=2)
    rows = list(range(len(NAMES)))
    left.axvline(0, color="#BBBBBB", linewidth=0.8, zorder=0)
    left.scatter(exact, rows, s=130, facecolors="none", edgecolors=COLOURS[0], linewidths=1.5, label="least squares")
    left.scatter(learned, rows, s=30, color=COLOURS[1], label="learned")
    left.set(yticks=rows, yticklabels=NAMES, title="Coefficients, in standard deviations")
    left.invert_yaxis()
    left.legend(frameon=False, fontsize=9)
    ends = torch.cat([truth, guess]).aminmax()
    right.plot(ends, ends, color="#BBBBBB", linewidth=0.8, zorder=0)
    right.scatter(truth, guess, s=18, color=COLOURS[1], alpha=0.7, linewidths=0)
    right.set(xlabel="progress of the disease", ylabel="predicted", title="Test set, in standard deviations")
    right.set_aspect("equal")
    return figure
