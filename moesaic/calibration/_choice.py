"""Chooses a format for each weight, so that a model loses least within a budget of bits.

The growth of the divergence is proportional to the squared rounding error of a weight, while errors are small. A weight
is measured in one format, and the growth in another is scaled with the squared errors of both on normally distributed
weights, which rotated weights almost are.

The budget is spent greedily: the next bits go to the weight that gains most for each of them. The squared errors of the
formats are convex in their bits, so this is the solution of the Lagrangian (Shoham and Gersho, 1988,
doi:10.1109/29.90373), up to the last weight.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moesaic import formats
from moesaic.errors import InvalidParameter

FORMATS = ("int2", "int3", "int4", "int8")
"""Formats to choose from, with increasing bits."""
MEASURED = "int3"
"""The format that a weight is measured in."""
_ROWS = 256


@dataclass(frozen=True)
class Sensitivity:
    """What a weight costs.

    Attributes:
        shape: logical shape of the weight, or of its stack.
        growth: divergence in nats per token that rounding it to ``MEASURED`` adds.
    """

    shape: tuple[int, ...]
    growth: float

    def nbytes(self, name: str) -> int:
        """Return the bytes of the weight in a format."""
        return formats.load(name).nbytes(self.shape)

    @property
    def weights(self) -> int:
        """Number of weights, without padding."""
        return torch.Size(self.shape).numel()

    def divergence(self, name: str) -> float:
        """Return the divergence in nats per token that rounding to a format adds."""
        return self.growth * squared_error(name) / squared_error(MEASURED)


@functools.cache
def squared_error(name: str) -> float:
    """Return the squared relative error of a format on normally distributed weights."""
    weight = torch.randn(_ROWS, _ROWS, generator=torch.Generator().manual_seed(0))
    difference = formats.load(name).pack(weight).dequantize() - weight
    return float((difference.norm() / weight.norm()).square())


def choose(weights: Mapping[str, Sensitivity], bits: float) -> dict[str, str]:
    """Return the name of the format of each weight; together they take at most ``bits`` per weight.

    Raises:
        InvalidParameter: the smallest format takes more bits.
    """
    chosen = dict.fromkeys(weights, FORMATS[0])
    total = sum(weight.weights for weight in weights.values())
    left = bits * total / 8 - sum(weight.nbytes(FORMATS[0]) for weight in weights.values())
    if left < 0:
        smallest = bits - 8 * left / total
        raise InvalidParameter("bits", f"is {bits:g}, but the smallest format of this model takes {smallest:.2f}")
    steps = [_step(name, weight, 0) for name, weight in weights.items()]
    heapq.heapify(steps)
    while steps:
        _, name, level, price = heapq.heappop(steps)
        if price > left:
            continue
        left -= price
        chosen[name] = FORMATS[level]
        if level + 1 < len(FORMATS):
            heapq.heappush(steps, _step(name, weights[name], level))
    return chosen


def _step(name: str, weight: Sensitivity, level: int) -> tuple[float, str, int, int]:
    """Return minus the gain per byte of the format after ``level``, the name, the next level, and its price."""
    now, after = FORMATS[level], FORMATS[level + 1]
    price = weight.nbytes(after) - weight.nbytes(now)
    return (weight.divergence(after) - weight.divergence(now)) / price, name, level + 1, price


@dataclass(frozen=True)
class Choice:
    """The format that was chosen for a weight.

    Attributes:
        format: its name.
        weights: number of weights.
        bits: bits per weight, with scales and padding.
        growth: divergence in nats per token that rounding to this format adds, as it was measured.
    """

    format: str
    weights: int
    bits: float
    growth: float


def mean_bits(chosen: Mapping[str, Choice]) -> float:
    """Return the bits per weight that the chosen formats take together."""
    return sum(c.bits * c.weights for c in chosen.values()) / sum(c.weights for c in chosen.values())


def choices(weights: Mapping[str, Sensitivity], bits: float) -> dict[str, Choice]:
    """Return what ``choose`` chooses for each weight; errors are those of ``choose``."""
    found = {}
    for name, chosen in choose(weights, bits).items():
        weight = weights[name]
        size = 8 * weight.nbytes(chosen) / weight.weights
        found[name] = Choice(chosen, weight.weights, size, weight.divergence(chosen))
    return found


def lines(chosen: Mapping[str, Choice]) -> Iterator[str]:
    """Yield a table of choices: a row for each layer, and a column for each weight of a layer; then their bits."""
    rows: dict[str, dict[str, str]] = {}
    for name, choice in chosen.items():
        parts = name.split(".")
        layer = parts[2] if name.startswith("model.layers.") else parts[0]
        column = parts[-2] if layer.isdigit() else "weight"
        rows.setdefault(layer, {})[column] = choice.format
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    yield " ".join(f"{title:>9}" for title in ("layer", *columns)).rstrip()
    for layer in sorted(rows, key=lambda layer: (not layer.isdigit(), layer.zfill(6))):
        cells = (layer, *(rows[layer].get(column, "") for column in columns))
        yield " ".join(f"{cell:>9}" for cell in cells).rstrip()
    growth = sum(choice.growth for choice in chosen.values())
    yield f"{mean_bits(chosen):.3f} bits per quantized weight; expected divergence {growth:.3g} nats per token"
