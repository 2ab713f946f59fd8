"""Three bits per weight (3.19 with scales)."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """Format with codes of 3 bits."""

    name = "int3"
    bits = 3
    levels = (-16, -10, -6, -2, 2, 6, 10, 16)
    usual_step = 0.0244
    error = 0.17
