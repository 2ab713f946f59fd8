"""Eight bits a weight (8.06 with its steps): as good as bfloat16 for all that is known."""

from __future__ import annotations

from moesaic.formats._tiles import Tiled


class Format(Tiled):
    """A weight of whole multiples of a step, 8 bits each."""

    name = "int8"
    bits = 8
    error = 0.008
