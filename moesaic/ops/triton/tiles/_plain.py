"""Reads unquantized weights."""

from __future__ import annotations

import triton
import triton.language as tl


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
    at = k + tl.arange(0, 64)
    inside = (rows < count)[:, None] & (at < columns)[None, :]
    values = tl.load(weight + rows[:, None] * columns + at[None, :], mask=inside, other=0.0).to(tl.float32)
    return values, tl.full(rows.shape, 1.0, tl.float32)
