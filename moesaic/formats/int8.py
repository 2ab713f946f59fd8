"""Eight bits per weight (8.06 with steps): no measured loss of quality against bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """A weight of integer multiples of a step, 8 bits per weight."""

    name = "int8"
    bits = 8
    error = 0.008
