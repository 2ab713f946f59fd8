"""Two bits a weight (2.44 with its scales): for experts, where memory is short."""

from __future__ import annotations

from moesaic.formats._tiles import Tiled


class Format(Tiled):
    """A weight of whole multiples of a step, 2 bits each."""

    name = "int2"
    bits = 2
    group = 32
    factor = 5
    error = 0.4
