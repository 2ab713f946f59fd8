"""Whether numbers can be written into a file without changing them."""

from __future__ import annotations

import torch
from torch import Tensor


class Inexact(Exception):
    """Quantized weights cannot be written without changing a number. The text is a clause that says why."""


def exact_cast(numbers: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return ``numbers`` in ``dtype``; None if one of them changes."""
    cast = numbers.to(dtype)
    return cast if torch.equal(cast.float(), numbers.float()) else None
