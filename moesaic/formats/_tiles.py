"""Base of the integer formats: tiles of 32 rows that a kernel reads sequentially.

Weights are rotated first (``_rotation``). A rotated weight is ``step * v`` with an integer v, -127 <= v <= 127, and one
bfloat16 step for each 256 columns of a row. Formats of fewer than 8 bits compute v from a code q. Each group of 16
columns of a row has a scale of its own:

    v = scale * levels[q]        scale: 4, 5, 6 or 7; levels: one of few integers from -16 to 16

Because v is an integer, a product with integer activations is exact in every order of summation. Every kernel
therefore gives the same bits, for one token or for many.

The levels are those that lose least on normally distributed weights, which rotated weights almost are (Lloyd,
doi:10.1109/TIT.1982.1056489). A larger number of them is near 0.

The memory holds blocks of 32 rows. A block holds superblocks of 256 columns; the last one may have 64, 128 or 192.
Missing rows and columns are zero. A superblock consists of:

    steps     [32] bfloat16
    scales    [32] words; bits 2 g and 2 g + 1 of a word are the scale of group g, less 4
    codes     planes as ``_planes`` describes; a 32-bit word belongs to one row, and 16 rows fill 64 bytes

int8 has no scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.formats import _planes
from moesaic.formats._blocks import PAD, SUPER, Blocked, nonzero
from moesaic.formats._planes import ROWS
from moesaic.formats._rotation import restore_weights, rotate_weights
from moesaic.formats._threads import for_each

GROUP = 16
"""Columns of a row that share a scale."""
SCALES = (4, 5, 6, 7)
TRIED_STEPS = (0.85, 0.95, 1.05, 1.2)
"""Steps that are tried for a row of a superblock, as fractions of ``Tiled.usual_step``."""
SLICE = 1 << 22
"""Weights that a thread quantizes at a time; bounds the temporary memory."""


@dataclass(frozen=True)
class Tiled(Blocked):
    """Base of a format that stores a weight in tiles of 32 rows; a subclass only sets the numbers below."""

    bits: ClassVar[int]
    """Bits of the code that stores a weight."""
    levels: ClassVar[tuple[int, ...]] = ()
    """The integers that the codes stand for, times the scale; empty: the code less 128, and there are no scales."""
    usual_step: ClassVar[float] = 0.0
    """The step that loses least on normally distributed weights whose standard deviation is 1."""

    def _sections(self, width: int) -> tuple[int, int, int]:
        """Return the bytes of the steps, scales and codes of a superblock of ``width`` columns."""
        return 2 * ROWS, 4 * ROWS if self.levels else 0, ROWS * width * self.bits // 8

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
        return torch.cat([self.store(*self.nearest(rotate_weights(part))) for part in plain.split(SUPER, dim=1)], dim=1)

    def store(self, step: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
        """Return the bytes [blocks, n] of a superblock from steps [R], scales [R, groups] and codes [R, width]."""
        steps = step.to(torch.bfloat16).reshape(-1, ROWS).view(torch.uint8)
        pieces = [steps, _planes.pack(codes, self.bits)]
        if self.levels:
            pieces.insert(1, _pack_scales(scale))
        return torch.cat(pieces, dim=1)

    def _untile(self, tile: Tensor, width: int) -> Tensor:
        steps, scales, codes = tile.split(self._sections(width), dim=1)
        step = steps.contiguous().view(torch.bfloat16).float()[:, :, None]
        q = _planes.unpack(codes, self.bits, width)
        if self.levels:
            v = torch.tensor(self.levels, device=tile.device).float()[q.long()].unflatten(-1, (-1, GROUP))
            v = (v * _unpack_scales(scales, width // GROUP)[..., None]).flatten(-2)
        else:
            v = q.float() - 128
        return restore_weights(step * v)

    def nearest(self, rotated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize rotated weights [R, width] of one superblock; return step, scale and codes.

        Their shapes are [R], [R, groups] and [R, width]. Several steps are tried, and the one with the least squared
        error is taken. A smaller step clips the extremes and is finer for the other weights.
        """
        if not self.levels:
            step = rounded(rotated.abs().amax(1) / 127)
            codes = (rotated * inverse(step)[:, None]).round().clamp(-127, 127) + 128
            return step, rotated.new_zeros(len(rotated), 0), codes
        usual = rotated.square().mean(1).sqrt() * self.usual_step
        tried = []
        for share in TRIED_STEPS:
            step = rounded(usual * share)
            scale, error = self.best_scales(rotated, step)
            tried.append((error.sum(1), step, scale))
        _, step, scale = best_choice(tried)
        return step, scale, self.codes(rotated, step, scale)

    def best_scales(self, rotated: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale of each group that loses least with these steps [R], and its squared error: [R, groups]."""
        levels = torch.tensor(self.levels, device=rotated.device).float()
        errors = []
        for scale in SCALES:
            unit = (step * scale)[:, None]
            nearest = levels[_nearest(rotated * inverse(unit), levels)] * unit
            errors.append((nearest - rotated).square().unflatten(1, (-1, GROUP)).sum(2))
        error, index = torch.stack(errors).min(0)
        return torch.tensor(SCALES, device=rotated.device)[index], error

    def codes(self, rotated: Tensor, step: Tensor, scale: Tensor) -> Tensor:
        """Return the codes [R, width] whose levels are nearest to rotated weights, given steps and scales."""
        unit = (step[:, None] * scale).repeat_interleave(GROUP, 1)
        return _nearest(rotated * inverse(unit), torch.tensor(self.levels, device=rotated.device).float())


def inverse(step: Tensor) -> Tensor:
    """Return 1 / step; 1 where the step is 0, because all weights are 0 then."""
    return 1 / nonzero(step)


Choice = tuple[Tensor, ...]
"""A loss [R], and tensors [R] or [R, n] that belong to it."""


def best_choice(choices: Sequence[Choice]) -> Choice:
    """Return, for each row, the choice with the least loss."""
    best = choices[0]
    for choice in choices[1:]:
        less = choice[0] < best[0]
        pairs = zip(choice, best, strict=True)
        best = tuple(torch.where(less if a.dim() == 1 else less[:, None], a, b) for a, b in pairs)
    return best


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)


def _pack_scales(scale: Tensor) -> Tensor:
    """Return the bytes [blocks, 128] that store scales [32 * blocks, groups]."""
    shifts = 2 * torch.arange(scale.shape[1], device=scale.device)
    words = ((scale.long() - SCALES[0]) << shifts).sum(1)
    return words.view(torch.int32)[::2].contiguous().reshape(-1, ROWS).view(torch.uint8)  # the lower halves


def _unpack_scales(data: Tensor, groups: int) -> Tensor:
    words = data.contiguous().view(torch.int32).long()[..., None]  # [blocks, 32, 1]
    return (words >> 2 * torch.arange(groups, device=data.device) & 3) + SCALES[0]


def _padded_to_blocks(part: Tensor) -> Tensor:
    """Return weights [rows, columns] padded with zeros to whole blocks."""
    rows, columns = part.shape
    return torch.nn.functional.pad(part, (0, -columns % PAD, 0, -rows % ROWS))


def rounded(x: Tensor) -> Tensor:
    """Return ``x`` rounded to bfloat16, as float32."""
    return x.to(torch.bfloat16).float()
