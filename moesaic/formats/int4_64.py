"""Four bits per weight (4.25 with scales), 64 columns per scale."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """Format with codes of 4 bits; 64 columns of a row share a scale and an offset."""

    name = "int4_64"
    bits = 4
    group = 64
    error = 0.1
