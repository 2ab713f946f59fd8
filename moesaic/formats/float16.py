"""IEEE half precision: more precise than bfloat16 but limited to +-65504; used by older checkpoints."""

from __future__ import annotations

import torch

from moesaic.formats._plain import Plain


class Format(Plain):
    """A weight in float16."""

    name = "float16"
    dtype = torch.float16
    error = 2**-11
