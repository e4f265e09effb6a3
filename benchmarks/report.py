"""The table, the JSON file and the chart."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

import torchcalc
from benchmarks.harness import Result


def environment() -> dict[str, Any]:
    from torchcalc import native

    return {
        "torchcalc": torchcalc.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "kernels": "loaded" if native.available() else native.why_not(),
    }


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def human(x: float, unit: str) -> str:
    """Return seconds or bytes with three digits and a prefix."""
    scales = {"s": (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)), "B": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))}
    name, scale = next((each for each in scales[unit] if x >= each[1]), scales[unit][-1])
    return f"{x / scale:.3g} {name}"


def table(results: list[Result]) -> str:
    """Markdown. 'of limit': how much of the bandwidth limit our step reaches."""
    lines = [
        "| step | against | stock | ours | ratio | middle half | target | limit | of limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        limit, reached = (human(r.limit, r.unit), f"{r.reached:.0%}") if r.limit and r.reached else ("-", "-")
        lines.append(
            f"| {r.name} | {r.against} | {human(r.stock, r.unit)} | {human(r.ours, r.unit)} | {r.ratio:.2f} | "
            f"{r.low:.2f} - {r.high:.2f} | {r.aim} | {limit} | {reached} |"
        )
    return "\n".join(lines)


def write_json(path: Path, environment: dict[str, Any], results: list[Result], growth: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"environment": environment, "results": [r.as_json() for r in results], "growth": growth}
    path.write_text(json.dumps(data, indent=2) + "\n")


def write_chart(path: Path, environment: dict[str, Any], results: list[Result], growth: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1,
        2 if growth else 1,
        figsize=(14 if growth else 9, 0.4 * len(results) + 2),
        squeeze=False,
        layout="constrained",
    )
    bars = axes[0, 0]
    names = [f"{r.name}\nvs {r.against}" for r in results]
    places = range(len(results))
    ratios = [r.ratio for r in results]
    spread = [[r.ratio - min(r.low, r.ratio) for r in results], [max(r.high, r.ratio) - r.ratio for r in results]]
    bars.barh(places, ratios, xerr=spread, color=["tab:green" if x >= 0.97 else "tab:red" for x in ratios], alpha=0.8)
    bars.set_yticks(places, names, fontsize=7)
    bars.invert_yaxis()
    bars.set_xscale("log")
    bars.axvline(1.0, color="black", linewidth=1)
    bars.set_xlabel("stock time / our time (log)")
    if growth:
        curve = axes[0, 1]
        count = [point["parameters"] for point in growth]
        curve.loglog(count, [point["stock"] for point in growth], "o-", label="torch AdamW(fused=True)")
        curve.loglog(count, [point["ours"] for point in growth], "o-", label="torchcalc AdamW")
        last = growth[-1]
        curve.loglog(count, [last["ours"] * n / count[-1] for n in count], ":", color="gray", label="linear")
        curve.set_xlabel("parameters")
        curve.set_ylabel("seconds a step")
        curve.legend()
    figure.suptitle(", ".join(f"{k} {v}" for k, v in environment.items() if k in ("torch", "processor", "threads")))
    figure.savefig(path, dpi=110)
    plt.close(figure)
