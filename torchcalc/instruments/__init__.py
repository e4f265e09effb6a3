"""Instruments that show training in TensorBoard: Lightning callbacks, one entry in a YAML each, and plain functions."""

try:
    import lightning.pytorch  # noqa: F401
except ImportError as error:
    raise ImportError("torchcalc.instruments needs Lightning: pip install 'torchcalc[recipes]'") from error

from torchcalc.instruments.contours import animate_paths, contour_figure
from torchcalc.instruments.dashboard import Dashboard, layout
from torchcalc.instruments.exact_resume import ExactResume
from torchcalc.instruments.gradient_flow import GradientFlow, gradient_norms
from torchcalc.instruments.history import DepthHistory
from torchcalc.instruments.instruments import Instruments
from torchcalc.instruments.landscape import Landscape
from torchcalc.instruments.learning_rate import LearningRate, LearningRateRangeTest, learning_rates
from torchcalc.instruments.loops import AtomicCheckpointIO
from torchcalc.instruments.loss_surface import LossPlane, LossSlice, loss_plane, loss_slice
from torchcalc.instruments.predictions import Predictions, confusion_figure, confusion_matrix, scatter_figure
from torchcalc.instruments.sharpness import Sharpness, SharpnessReading, sharpness
from torchcalc.instruments.update_ratio import UpdateRatio, update_ratios

__all__ = [
    "AtomicCheckpointIO",
    "Dashboard",
    "DepthHistory",
    "ExactResume",
    "GradientFlow",
    "Instruments",
    "Landscape",
    "LearningRate",
    "LearningRateRangeTest",
    "LossPlane",
    "LossSlice",
    "Predictions",
    "Sharpness",
    "SharpnessReading",
    "UpdateRatio",
    "animate_paths",
    "confusion_figure",
    "confusion_matrix",
    "contour_figure",
    "gradient_norms",
    "layout",
    "learning_rates",
    "loss_plane",
    "loss_slice",
    "scatter_figure",
    "sharpness",
    "update_ratios",
]
