"""Reads weights in int8."""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.ops.triton.tiles._integer import superblock

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
    q, _, step = superblock(weight, rows, k, count, block_bytes, 8, 0)
    return (q - 128).to(tl.float32), step
