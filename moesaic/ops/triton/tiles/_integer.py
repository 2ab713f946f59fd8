"""Reads the integer formats, whose layout ``formats/_tiles.py`` describes."""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.ops.triton.tiles._planes import codes


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
    SCALE_BYTES: tl.constexpr = 128 if LEVELS else 0
    inside = rows < count
    row = rows % 32
    first = rows // 32 * block_bytes + k // 256 * (64 + SCALE_BYTES + 1024 * BITS)
    step = tl.load((weight + first + 2 * row).to(tl.pointer_type(tl.bfloat16)), mask=inside, other=0.0)
    words = (weight + first + 64 + SCALE_BYTES + 4 * row).to(tl.pointer_type(tl.int32))
    q = codes(words, k % 256, inside, BITS)
    if LEVELS:
        scale = tl.load((weight + first + 64 + 4 * row).to(tl.pointer_type(tl.int32)), mask=inside, other=0)
        values = _scaled(q, scale, k, BITS, LEVELS)
    else:
        values = (q - 128).to(tl.float32)
    return values, step.to(tl.float32) * 16


@triton.jit
def _scaled(q, scale, k, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Return the integers [n, 64] that codes stand for, as float32."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    place = tl.where(q >= HALF, q - HALF, HALF - 1 - q)
    size = ((LEVELS >> (4 * place).to(tl.int64)) & 15).to(tl.int32) + 1
    level = tl.where(q >= HALF, size, -size)
    group = (k % 256 + tl.arange(0, 64)) // 16
    factor = ((scale[:, None] >> (2 * group)[None, :]) & 3) + 4
    return (level * factor).to(tl.float32)
