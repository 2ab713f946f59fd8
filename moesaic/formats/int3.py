"""Three bits per weight (3.25 with scales)."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """A weight of integer multiples of a step, 3 bits per weight."""

    name = "int3"
    bits = 3
    group = 64
    factor = 2
    error = 0.2
