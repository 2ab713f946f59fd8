"""IEEE single precision: 32 bits per weight, exact for every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.formats._plain import Plain


@dataclass(frozen=True)
class Format(Plain):
    """Format that stores a weight in float32."""

    name = "float32"
    dtype = torch.float32
    error = 0.0
