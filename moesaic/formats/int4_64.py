"""Four bits a weight (4.25 with its scales), 64 columns to a scale."""

from __future__ import annotations

from moesaic.formats._tiles import Tiled


class Format(Tiled):
    """A weight of whole multiples of a step, 4 bits each."""

    name = "int4_64"
    bits = 4
    group = 64
    error = 0.1
