"""Draw the divergence of quantized models over their bits, from the JSON file of ``benchmarks.quantization``.

python -m benchmarks.quantization_plot docs/results/quantization.json docs/images/quantization.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.bench import plotting

Row = Mapping[str, Any]

PANELS = {"stored": "weights as stored, on the grid of Q4_1", "moved": "weights moved off the grid"}
MAXIMUM_BITS = 5.0
"""Rows with more bits lose almost nothing in all engines, and are not drawn."""
SERIES = {
    "calibrated": "Moesaic, calibrated",
    "to nearest": "Moesaic, to nearest",
    "importance matrix": "llama.cpp with an importance matrix",
}
LABELS = {"calibrated": (-5, -5, "right", "top"), "to nearest": (5, 3, "left", "bottom")}
"""Where the name of a format stands beside its point: x, y, and the alignments; the other names stand to the right."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a panel for stored and one for moved weights, to an .svg or .png file.

    Args:
        rows: rows of the JSON file.
        path: the file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axis, (model, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        found = [row for row in rows if row["model"] == model and row["bits"] <= MAXIMUM_BITS]
        for colour, method in zip(plotting.COLOURS, SERIES, strict=False):
            _series(axis, [row for row in found if row["method"] == method], method, colour)
        axis.set_yscale("log")
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel("bits of a quantized weight, with scales")
        axis.grid(visible=True, which="major", linewidth=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.08)
    figure.axes[0].set_ylabel("KL divergence from the unquantized weights, nats per token")
    figure.axes[0].legend(fontsize="small", frameon=False)
    figure.suptitle("SmolLM2-135M-Instruct: what quantization costs", fontsize="large")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _series(axis: Any, rows: Sequence[Row], method: str, colour: str) -> None:
    """Draw the rows of a method as labelled points; a line joins Moesaic's."""
    rows = sorted(rows, key=lambda row: float(row["bits"]))
    points = [(row["bits"], row["kl_divergence"][0]) for row in rows]
    style, (x, y, *alignment) = "o-" if method in LABELS else "s", LABELS.get(method, (6, 0, "left", "center"))
    axis.plot(*zip(*points, strict=True), style, color=colour, label=SERIES[method], markersize=5)
    for row, point in zip(rows, points, strict=True):
        name = f"{row['name']} bits" if row["name"][0].isdigit() else row["name"]
        where = dict(zip(("ha", "va"), alignment, strict=True))
        axis.annotate(name, point, (x, y), textcoords="offset points", fontsize="x-small", color=colour, **where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file of benchmarks.quantization")
    parser.add_argument("plot", type=Path, help=".svg or .png file to write")
    args = parser.parse_args()
    plotting.check(args.plot)
    draw(json.loads(args.results.read_text())["figures"]["rows"], args.plot)


if __name__ == "__main__":
    main()
