"""Base of the integer formats: tiles of 32 rows that a kernel reads sequentially.

A weight is ``step * v`` with an integer v, -128 <= v <= 127, and one bfloat16 step for each 256 columns of a row.
Formats of fewer than 8 bits compute v from a code q. Each ``group`` of columns of a row has its own scale and offset:

    v = factor * scale * q - offset        q: ``bits`` bits, scale: 1 .. 15, offset: -127 .. 127

Because v is an integer, a product with integer activations is exact in every order of summation. Every kernel
therefore gives the same bits, for one token or for many.

The memory holds blocks of 32 rows. A block holds superblocks of 256 columns; the last one may have 64, 128 or 192.
Missing rows and columns are zero. A superblock consists of:

    steps     [32] bfloat16
    scales    [groups][16] uint8: the low four bits belong to row i, the high four to row 16 + i
    offsets   [pairs of groups][2 halves][16 rows][2] int8; halves: rows 0 .. 15 and 16 .. 31
    codes     planes as ``_planes`` describes; a 32-bit word belongs to one row, and 16 rows fill 64 bytes

Scales are padded to 64 bytes, offsets to a whole pair; int8 has neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.formats import _planes
from moesaic.formats._blocks import PAD, SUPER, Blocked, nonzero
from moesaic.formats._planes import ROWS
from moesaic.formats._threads import for_each

LARGEST_SCALE = 15
HEADROOM = 120
"""Upper bound of |weight / step|, so that rounding away from 0 stays within -128 .. 127."""
SLICE = 1 << 22
"""Weights that a thread quantizes at a time; bounds the temporary memory."""


@dataclass(frozen=True)
class Tiled(Blocked):
    """Base of a format that stores a weight in tiles of 32 rows; a subclass only sets the numbers below."""

    bits: ClassVar[int]
    """Bits of the code that stores a weight."""
    group: ClassVar[int] = 0
    """Columns of a row that share a scale and an offset; 0: there are no scales, and codes are the integers v."""
    factor: ClassVar[int] = 1
    """Constant by which every scale is multiplied."""

    def _sections(self, width: int) -> tuple[int, int, int, int]:
        """Return the bytes of the steps, scales, offsets and codes of a superblock of ``width`` columns."""
        groups = width // self.group if self.group else 0
        return 2 * ROWS, _padded(groups * 16), _padded(groups * ROWS), ROWS * width * self.bits // 8

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        [(shape, dtype)] = self.layout(tuple(weight.shape)).values()
        tiles = torch.empty(shape, dtype=dtype, device=weight.device).reshape(-1, *shape[-2:])
        rows = max(1, SLICE // weight.shape[-1] // ROWS) * ROWS

        def tile(place: tuple[Tensor, Tensor, int]) -> None:
            matrix, target, begin = place
            part = _padded_to_blocks(matrix[begin : begin + rows].float())
            target[begin // ROWS : (begin + len(part)) // ROWS] = self._tile(part)

        matrices = zip(weight.reshape(-1, *weight.shape[-2:]), tiles, strict=True)
        places = [(matrix, target, begin) for matrix, target in matrices for begin in range(0, len(matrix), rows)]
        for_each(tile, places, weight.device)
        return {"tiles": tiles.reshape(shape)}

    def _tile(self, plain: Tensor) -> Tensor:
        """Return the bytes [blocks, bytes] that store the padded plain weights [32 * blocks, columns]."""
        pieces = []
        for part in plain.split(SUPER, dim=1):
            step, scale, offset, codes = self._round(part)
            steps = step.to(torch.bfloat16).reshape(-1, ROWS).view(torch.uint8)
            pieces += [steps, _pack_scales(scale), _pack_offsets(offset), _planes.pack(codes, self.bits)]
        return torch.cat(pieces, dim=1)

    def _untile(self, tile: Tensor, width: int) -> Tensor:
        steps, scales, offsets, codes = tile.split(self._sections(width), dim=1)
        step = steps.contiguous().view(torch.bfloat16).float()[:, :, None]
        q = _planes.unpack(codes, self.bits, width).float()
        if not self.group:
            plain: Tensor = step * (q - 128)
            return plain
        groups = width // self.group
        scale = _unpack_scales(scales, groups)[..., None] * self.factor
        offset = _unpack_offsets(offsets, groups)[..., None]
        v = q.reshape(*q.shape[:2], groups, self.group) * scale - offset
        plain = step * v.flatten(2)
        return plain

    def _round(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize plain weights [R, width] of one superblock; return step, scale, offset and codes.

        Their shapes are [R], [R, groups], [R, groups] and [R, width].

        Several scales are tried, and the one with the least squared error is taken. A narrower grid clips the
        extremes of the group and is finer for the other weights.
        """
        if not self.group:
            step = _upwards(part.abs().amax(1) / 127)
            codes = (part / nonzero(step)[:, None]).round().clamp(-127, 127) + 128
            return step, part.new_zeros(len(part), 0), part.new_zeros(len(part), 0), codes
        levels = (1 << self.bits) - 1
        w = part.reshape(len(part), -1, self.group)
        low, high = w.amin(2), w.amax(2)
        reach = torch.maximum(
            (high - low).amax(1) / (LARGEST_SCALE * levels * self.factor), part.abs().amax(1) / HEADROOM
        )
        step = _upwards(reach)
        w = w / nonzero(step)[:, None, None]
        low, high = w.amin(2), w.amax(2)
        widest = ((high - low) / (levels * self.factor)).ceil().clamp(1, LARGEST_SCALE)
        best: tuple[Tensor, ...] | None = None
        for share in NARROWER[self.bits]:
            scale = (widest * share).round().clamp(1, LARGEST_SCALE)
            grid = scale * self.factor
            offset = ((grid * levels - low - high) / 2).round().clamp(-127, 127)
            most = ((127 + offset) / grid).floor().clamp(0, levels)
            codes = ((w + offset[..., None]) / grid[..., None]).round().clamp_min(0).minimum(most[..., None])
            error = (codes * grid[..., None] - offset[..., None] - w).square().sum(2)
            candidate = (error, scale, offset, codes)
            if best is None:
                best = candidate
            else:
                less = error < best[0]
                best = tuple(
                    torch.where(less if new.dim() == 2 else less[..., None], new, old)
                    for new, old in zip(candidate, best, strict=True)
                )
        assert best is not None
        return step, best[1], best[2], best[3].flatten(1)


NARROWER = {2: (1.0, 0.9, 0.8, 0.7, 0.6), 3: (1.0, 0.9, 0.8), 4: (1.0, 0.93)}
"""Scales to try, by bits of a code, as fractions of the scale that covers the extremes of a group."""


def _pack_scales(scale: Tensor) -> Tensor:
    """Return the padded bytes [blocks, n] that store scales [32 * blocks, groups]."""
    halves = scale.to(torch.uint8).reshape(len(scale) // ROWS, 2, 16, scale.shape[1])
    packed = (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2).flatten(1)
    return torch.nn.functional.pad(packed, (0, _padded(packed.shape[1]) - packed.shape[1]))


def _unpack_scales(data: Tensor, groups: int) -> Tensor:
    packed = data[:, : groups * 16].reshape(len(data), groups, 16)
    return torch.cat((packed & 15, packed >> 4), dim=2).transpose(1, 2)  # [blocks, 32, groups]


def _pack_offsets(offset: Tensor) -> Tensor:
    """Return the bytes [blocks, n] that store offsets [32 * blocks, groups], padded to a whole pair of groups."""
    even = torch.nn.functional.pad(offset, (0, offset.shape[1] % 2)).to(torch.int8)
    pairs = even.reshape(len(even) // ROWS, 2, 16, even.shape[1] // 2, 2)
    return pairs.permute(0, 3, 1, 2, 4).flatten(1).view(torch.uint8)


def _unpack_offsets(data: Tensor, groups: int) -> Tensor:
    pairs = data.contiguous().view(torch.int8).reshape(len(data), -(-groups // 2), 2, 16, 2)
    return pairs.permute(0, 2, 3, 1, 4).reshape(len(data), ROWS, -1)[..., :groups]


def _padded_to_blocks(part: Tensor) -> Tensor:
    """Return weights [rows, columns] padded with zeros to whole blocks."""
    rows, columns = part.shape
    return torch.nn.functional.pad(part, (0, -columns % PAD, 0, -rows % ROWS))


def _upwards(x: Tensor) -> Tensor:
    """Round x >= 0 up to bfloat16; return float32."""
    rounded = x.to(torch.bfloat16)
    bits = rounded.view(torch.int16)
    return torch.where(rounded.float() < x, (bits + 1).view(torch.bfloat16), rounded).float()


def _padded(size: int) -> int:
    return math.ceil(size / 64) * 64
