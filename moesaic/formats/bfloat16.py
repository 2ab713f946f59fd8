"""bfloat16: float32's range with 8 bits of precision; the dtype in which Mixtral and Llama 3 are published."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.formats._plain import Plain


@dataclass(frozen=True)
class Format(Plain):
    """Format that stores a weight in bfloat16."""

    name = "bfloat16"
    dtype = torch.bfloat16
    error = 2**-8
