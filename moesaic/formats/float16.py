"""IEEE half precision: more precise than bfloat16 but limited to +-65504; used by older checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.formats._plain import Plain


@dataclass(frozen=True)
class Format(Plain):
    """Format that stores a weight in float16."""

    name = "float16"
    dtype = torch.float16
    error = 2**-11
