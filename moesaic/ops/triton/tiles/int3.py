"""Reads weights in int3."""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.ops.triton.tiles._integer import scaled, superblock

ROTATED = True


@triton.jit
def read(
    weight,
    table,
    rows,
    k,
    count,
    columns,
    padded,
    block_bytes,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    LEVELS: tl.constexpr,
):
    q, scale, step = superblock(weight, rows, k, count, block_bytes, 3, 128)
    return scaled(q, scale, k, 3, 0xF951), step
