"""Quantized weights as files have them: codes, and the scales and offsets of groups of columns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized matrix [rows, columns], or a stack of them, as a file has it.

    Attributes:
        codes: [..., rows, columns] uint8.
        scale: [..., rows, groups], in the scale's dtype; int8 for a super scale.
        offset: [..., rows, groups], in the scale's dtype or uint8; None if there is none.
        super_scale, super_offset: [..., rows, supers] float16; None unless the scale is super.
        order: [..., columns] int32, for each column of ``codes`` the column of the weight that it is; None: the same.
            Groups are consecutive columns of ``codes``.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    super_scale: Tensor | None = None
    super_offset: Tensor | None = None
    order: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def scales(self) -> list[Tensor]:
        """Return the tensors of floating-point numbers: scales and offsets, or their factors."""
        return [tensor for tensor in self.tensors().values() if tensor.is_floating_point()]
