"""Four bits per weight (4.44 with scales), 32 columns per scale: the usual choice."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """A weight of integer multiples of a step, 4 bits per weight."""

    name = "int4"
    bits = 4
    group = 32
    error = 0.09
