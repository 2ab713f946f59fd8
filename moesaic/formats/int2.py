"""Two bits per weight (2.19 with scales), for experts that otherwise do not fit."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.formats._tiles import Tiled


@dataclass(frozen=True)
class Format(Tiled):
    """Format with codes of 2 bits."""

    name = "int2"
    bits = 2
    levels = (-3, -1, 1, 3)
    usual_step = 0.092
    error = 0.34
