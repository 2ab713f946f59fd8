"""The speed of prompts that multiplication alone would allow: the arithmetic peak of a roofline."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moesaic.formats import Packed
from moesaic.hardware.limits import Limits
from moesaic.models import Decoder
from moesaic.models._layers import Router


def prompt_limit(model: Decoder, length: int, limits: Limits) -> float:
    """Return the tokens per second at which prompts of ``length`` tokens are read if only multiplication takes time.

    Weights are multiplied at the measured peak of their format, and attention at that of bfloat16. The head is left
    out, since it is computed once for a whole prompt.
    """
    seconds = sum(2 * count / limits.gop_s(name) for name, count in _multiplied(model))
    window = min(length, model.window or length)
    keys = window * (1 - window / (2 * length))  # on average over the tokens of the prompt
    shape = model.shape
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * keys / limits.bf16_gop_s
    return 1e9 / (seconds + attention)


def _multiplied(model: Decoder) -> Iterator[tuple[str, float]]:
    """Yield the format of each weight in a layer, and the number of its elements that a token is multiplied with."""
    for block in model.blocks:
        chosen = [module.k for module in block.modules() if isinstance(module, Router)]
        for module in block.modules():
            if isinstance(module, Packed):
                stack = module.shape[:-2]  # the experts, of which a token uses some
                count = math.prod(module.shape)
                yield module.name, count * chosen[0] / stack[0] if stack else count
