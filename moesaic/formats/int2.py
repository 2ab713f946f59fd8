"""Two bits per weight (2.44 with scales): for experts if memory is scarce."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """Format with codes of 2 bits; 32 columns of a row share a scale and an offset."""

    name = "int2"
    bits = 2
    group = 32
    factor = 5
    error = 0.4
