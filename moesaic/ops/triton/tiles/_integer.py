"""Reads the integer formats, whose layout ``formats/_tiles.py`` describes."""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.ops.triton.tiles._planes import codes


@triton.jit
def superblock(weight, rows, k, count, block_bytes, BITS: tl.constexpr, SCALE_BYTES: tl.constexpr):
    """Return the codes [n, 64], the scale words [n], and 16 times the steps [n], of columns k .. k + 63."""
    inside = rows < count
    row = rows % 32
    first = rows // 32 * block_bytes + k // 256 * (64 + SCALE_BYTES + 1024 * BITS)
    step = tl.load((weight + first + 2 * row).to(tl.pointer_type(tl.bfloat16)), mask=inside, other=0.0)
    scale = tl.zeros(rows.shape, tl.int32)
    if SCALE_BYTES:
        scale = tl.load((weight + first + 64 + 4 * row).to(tl.pointer_type(tl.int32)), mask=inside, other=0)
    words = (weight + first + 64 + SCALE_BYTES + 4 * row).to(tl.pointer_type(tl.int32))
    return codes(words, k % 256, inside, BITS), scale, step.to(tl.float32) * 16


@triton.jit
def scaled(q, scale, k, BITS: tl.constexpr, SIZES: tl.constexpr):
    """Return the integers [n, 64] that codes stand for. Hex digit i of ``SIZES`` is the i-th absolute level less 1."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    place = tl.where(q >= HALF, q - HALF, HALF - 1 - q)
    size = ((SIZES >> (4 * place).to(tl.int64)) & 15).to(tl.int32) + 1
    level = tl.where(q >= HALF, size, -size)
    group = (k % 256 + tl.arange(0, 64)) // 16
    factor = ((scale[:, None] >> (2 * group)[None, :]) & 3) + 4
    return (level * factor).to(tl.float32)
