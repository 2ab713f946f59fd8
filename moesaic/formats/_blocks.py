"""Base of the formats that store a weight in blocks of 32 rows, which a kernel reads sequentially.

A block holds superblocks of 256 columns; the last one may be narrower. Missing rows and columns are padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.formats import Layout, Shape, WeightFormat
from moesaic.formats._planes import ROWS

SUPER = 256
PAD = 64
"""The columns of a weight are padded to a multiple of this number, or of a larger one that the format states."""


@dataclass(frozen=True)
class Blocked(WeightFormat):
    """A format that stores codes in ``tiles``; a subclass defines the sections of a superblock and how to read them."""

    @property
    def padding(self) -> int:
        """Columns are padded to a multiple of this."""
        return PAD

    def layout(self, shape: Shape) -> Layout:
        *stack, out, columns = shape
        return {"tiles": ((*stack, -(-out // ROWS), self.block_bytes(columns)), torch.uint8)}

    def block_bytes(self, columns: int) -> int:
        """Return the bytes of one block of 32 rows with this number of columns."""
        return sum(end - begin for begin, end, _ in self._superblocks(columns))

    def _superblocks(self, columns: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first byte, end, number of columns) of each superblock in a block with this number of columns."""
        at, left = 0, -(-columns // self.padding) * self.padding
        while left:
            width = min(SUPER, left)
            end = at + sum(self._sections(width))
            yield at, end, width
            at, left = end, left - width

    def _sections(self, width: int) -> tuple[int, ...]:
        """Return the bytes of the sections of a superblock of ``width`` columns."""
        raise NotImplementedError

    def _untile(self, tile: Tensor, width: int) -> Tensor:
        """Return the plain float32 weights [blocks, 32, width] that one superblock's bytes [blocks, bytes] store."""
        raise NotImplementedError

    def unpack(self, parts: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
        tiles, (*stack, out, columns) = parts["tiles"], shape
        pieces = []
        for begin, end, width in self._superblocks(columns):
            pieces.append(self._untile(tiles[..., begin:end].reshape(-1, end - begin), width))
        plain = torch.cat(pieces, dim=-1).reshape(*stack, tiles.shape[-2] * ROWS, -1)
        return plain[..., :out, :columns].to(dtype)

    def rows(self, parts: Mapping[str, Tensor], shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
        blocks, places = (ids // ROWS).unique(return_inverse=True)
        plain = self.unpack({**parts, "tiles": parts["tiles"][blocks]}, (len(blocks) * ROWS, shape[1]), dtype)
        return plain[places * ROWS + ids % ROWS]


def nonzero(x: Tensor) -> Tensor:
    """Return ``x`` >= 0 with 1 in place of 0, to divide by."""
    return torch.where(x > 0, x, 1.0)
