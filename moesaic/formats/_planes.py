"""How codes of fewer than 8 bits lie in memory: planes of 32-bit words, each of which belongs to one row.

A block has 32 rows. A plane holds some bits of each code; codes of 3, 5 and 6 bits have two planes. The planes are
interleaved by runs of columns, so that a kernel reads all of them in one direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 32

PLANES = {
    8: ((0, 8),),
    6: ((0, 4), (4, 2)),
    5: ((0, 4), (4, 1)),
    4: ((0, 4),),
    3: ((0, 2), (2, 1)),
    2: ((0, 2),),
}
"""(lowest bit, number of bits) of each plane that stores a code, by bits of the code; 8 is a multiple of each
number."""

RUN = {8: 64, 6: 32, 5: 32, 4: 64, 3: 32, 2: 64}
"""Columns of a run, by bits of the code; each run stores all its planes before the next run begins."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes [blocks, n] of the planes of codes [32 * blocks, width], each of ``bits`` bits."""
    q = codes.to(torch.uint8).reshape(-1, 2, 16, codes.shape[1])  # [blocks, halves, rows, width]
    planes = [_pack_plane((q >> low) & ((1 << width) - 1), width) for low, width in PLANES[bits]]
    runs = codes.shape[1] // RUN[bits]
    return torch.cat([plane.reshape(len(q), runs, -1) for plane in planes], dim=2).flatten(1)


def unpack(data: Tensor, bits: int, width: int) -> Tensor:
    """Return the codes [blocks, 32, width] of ``bits`` bits, as uint8, from the bytes [blocks, n] of their planes."""
    runs = width // RUN[bits]
    sizes = [ROWS * RUN[bits] * plane // 8 for _, plane in PLANES[bits]]
    q = data.new_zeros(len(data), ROWS, width)
    for (low, plane), part in zip(PLANES[bits], data.reshape(len(data), runs, -1).split(sizes, dim=2), strict=True):
        q += _unpack_plane(part.reshape(len(data), -1), plane, width) << low
    return q


def _pack_plane(q: Tensor, bits: int) -> Tensor:
    """Return the bytes [blocks, n] of a plane of fields [blocks, 2, 16, width], each of ``bits`` bits.

    With p = 8 / bits fields in a byte, 4 p columns of a row make one 32-bit word: field j of byte b is column 4 j + b.
    The order is: columns within a word, rows of a half, halves, next columns.
    """
    fields = 8 // bits
    blocks, _, _, width = q.shape
    q = q.reshape(blocks, 2, 16, width // (4 * fields), fields, 4)
    shifts = bits * torch.arange(fields, device=q.device, dtype=torch.uint8)
    packed = (q << shifts[:, None]).sum(4, dtype=torch.uint8)  # [blocks, halves, rows, chunks, 4]
    return packed.permute(0, 3, 1, 2, 4).reshape(blocks, -1)


def _unpack_plane(data: Tensor, bits: int, width: int) -> Tensor:
    """Return the fields [blocks, 32, width] of ``bits`` bits from the bytes [blocks, n] of a plane."""
    fields = 8 // bits
    packed = data.reshape(len(data), -1, 2, 16, 1, 4)  # [blocks, chunks, halves, rows, 1, 4]
    shifts = bits * torch.arange(fields, device=data.device, dtype=torch.uint8)
    q = (packed >> shifts[:, None]) & ((1 << bits) - 1)
    return q.permute(0, 2, 3, 1, 4, 5).reshape(len(data), ROWS, width)
