"""Four bits a weight (4.44 with its scales), 32 columns to a scale: the usual choice."""

from __future__ import annotations

from moesaic.formats._tiles import Tiled


class Format(Tiled):
    """A weight of whole multiples of a step, 4 bits each."""

    name = "int4"
    bits = 4
    group = 32
    error = 0.09
