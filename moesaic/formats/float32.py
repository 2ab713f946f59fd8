"""IEEE single precision: exact for every checkpoint, 32 bits per weight."""

from __future__ import annotations

import torch

from moesaic.formats._plain import Plain


class Format(Plain):
    """A weight in float32."""

    name = "float32"
    dtype = torch.float32
    error = 0.0
