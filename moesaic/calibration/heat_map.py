"""Draws how many calibration tokens each expert of each layer got."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moesaic.errors import InvalidRequest


def draw(usage: Sequence[Sequence[int]], path: Path) -> None:
    """Draw a heat map with a row for each layer and a column for each expert, to an .svg or .png file.

    A cell is the tokens of an expert, divided by those that it would get if all experts of the layer got the same.

    Args:
        usage: tokens of each expert, for each layer; empty for a dense layer, which is left out.
        path: the file.

    Raises:
        InvalidRequest: the model has no experts.
    """
    from matplotlib.figure import Figure

    layers = {layer: counts for layer, counts in enumerate(usage) if counts}
    if not layers:
        raise InvalidRequest("the model has no experts to draw")
    shares = [[count * len(counts) / max(1, sum(counts)) for count in counts] for counts in layers.values()]
    columns = max(map(len, shares))
    figure = Figure(figsize=(2.5 + 0.35 * columns, 1.5 + 0.25 * len(shares)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    axis.set_xticks(range(columns))
    axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    figure.colorbar(image, label="tokens, 1 is an equal share")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
