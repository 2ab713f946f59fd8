"""Four bits per weight (4.44 with scales), 32 columns per scale: the usual choice."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """Format with codes of 4 bits; 32 columns of a row share a scale and an offset."""

    name = "int4"
    bits = 4
    group = 32
    error = 0.09
