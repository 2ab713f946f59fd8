"""Three bits per weight (3.25 with scales)."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """Format with codes of 3 bits; 64 columns of a row share a scale and an offset."""

    name = "int3"
    bits = 3
    group = 64
    factor = 2
    error = 0.2
