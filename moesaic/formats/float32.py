"""IEEE single precision: 32 bits per weight, exact for every checkpoint."""

from __future__ import annotations

import torch

from moesaic.formats._plain import Plain


class Format(Plain):
    """A weight in float32."""

    name = "float32"
    dtype = torch.float32
    error = 0.0
