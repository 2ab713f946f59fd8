"""Four bits per weight (4.25 with scales), 64 columns per scale."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """A weight of integer multiples of a step, 4 bits per weight."""

    name = "int4_64"
    bits = 4
    group = 64
    error = 0.1
