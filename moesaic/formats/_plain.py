"""Base of the unquantized formats: one part, ``weight``, in the format's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.formats import Layout, Shape, WeightFormat


@dataclass(frozen=True)
class Plain(WeightFormat):
    """Format that stores a weight unquantized, rounded to ``dtype``."""

    dtype: ClassVar[torch.dtype]

    def layout(self, shape: Shape) -> Layout:
        return {"weight": (shape, self.dtype)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.to(self.dtype)}

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        return parts["weight"].to(dtype)
