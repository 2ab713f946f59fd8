"""Base of the unquantized formats: one part, ``weight``, in the format's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.formats import Layout, Packed, Shape


class Plain(Packed):
    """A weight rounded to ``dtype``."""

    dtype: ClassVar[torch.dtype]

    @classmethod
    def layout(cls, shape: Shape) -> Layout:
        return {"weight": (shape, cls.dtype)}

    @classmethod
    def quantize(cls, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.to(cls.dtype)}

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        return parts["weight"].to(dtype)
