"""Four bits per weight (4.19 with scales): the usual choice."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """Format with codes of 4 bits."""

    name = "int4"
    bits = 4
    levels = (-16, -13, -10, -8, -6, -4, -2, -1, 1, 2, 4, 6, 8, 10, 13, 16)
    usual_step = 0.031
    error = 0.09
