"""The figure of the depth recipe: what the chain rule does to gradients, and what that does to training."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from torchcalc.instruments.figures import COLOURS, new_figure

FLOAT32 = 2.0**-149  # its smallest positive number


def depth_figure(
    depths: Sequence[int],
    gradients: Mapping[str, Sequence[float]],
    accuracy: Mapping[str, float],
    gain: Mapping[str, float],
) -> Figure:
    """Draw gradients at initialisation over the way back through the layers, and test accuracies over depth.

    Args:
        depths: linear layers of the nets, ascending.
        gradients: norm of the gradient at each layer, from input to output, of the net ``{kind}_{depth}``.
        accuracy: test accuracy of each net.
        gain: predicted factor of the gradient per layer, by kind.
    """
    figure, (left, right) = new_figure(9, 4.2, columns=2)
    deepest = max(depths)
    for colour, (kind, factor) in zip(COLOURS, gain.items(), strict=False):
        for depth in depths:
            norms = gradients[f"{kind}_{depth}"][::-1]
            left.semilogy(norms, color=colour, lw=1.2, marker="o", ms=4, markevery=[depth - 1])
        back = range(1, deepest)
        start = math.log(gradients[f"{kind}_{deepest}"][-2])
        left.semilogy(back, [math.exp(start + (k - 1) * math.log(factor)) for k in back], ":", color="black", lw=1.2)
        place = {
            "xy": (0.58 * deepest, math.exp(start + 0.58 * deepest * math.log(factor))),
            "textcoords": "offset points",
        }
        above = kind != "ReLU"
        left.annotate(
            f"{kind}: × {factor:.2g} a layer", **place, xytext=(0, 7 if above else -17), color=colour, weight="bold"
        )
        right.semilogx(depths, [accuracy[f"{kind}_{depth}"] for depth in depths], "o-", color=colour)
        depth = depths[min({"sigmoid": 1, "ReLU": 3}.get(kind, 2), len(depths) - 1)]
        beside = {"xy": (depth, accuracy[f"{kind}_{depth}"]), "textcoords": "offset points", "color": colour}
        right.annotate(kind, **beside, xytext=(0, 7) if kind == "residual" else (8, 4), weight="bold")
    bottom = min(left.get_ylim()[0], 1e-60)
    left.set_yticks([10.0**-power for power in range(0, int(-math.log10(bottom)) + 1, 20)])
    left.axhspan(bottom, FLOAT32, color="black", alpha=0.06, lw=0)
    left.text(2, FLOAT32 / 1e7, "zero in float32", va="top")
    left.set(
        title="Gradient at initialisation (dotted: predicted slope)",
        xlabel="layers back from the output",
        ylabel="‖∂loss/∂W‖",
        ylim=(bottom, 1e12),
    )
    right.axhline(0.1, color="black", ls=":", lw=1)
    right.text(depths[0], 0.115, "chance")
    right.set(title="After training", xlabel="layers", ylabel="test accuracy", ylim=(0, 1.02))
    right.set_xticks(depths, [str(depth) for depth in depths])
    right.minorticks_off()
    return figure
