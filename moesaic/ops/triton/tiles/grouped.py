"""Reads weights in the format ``grouped``, whose layout ``formats/grouped.py`` describes."""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.ops.triton.tiles._planes import codes

ROTATED = False


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
    SUPER: tl.constexpr = SCALE == "super" or SCALE == "super4"
    SUPER_BYTES: tl.constexpr = 0 if not SUPER else (128 if OFFSET == "value" else 64)
    SCALE_BYTES: tl.constexpr = 1 if SUPER else (4 if SCALE == "float32" else 2)
    SEPARATE: tl.constexpr = OFFSET != "none" and SCALE != "super4"
    OFFSET_BYTES: tl.constexpr = 0 if not SEPARATE else (1 if OFFSET == "zero" else SCALE_BYTES)
    FULL: tl.constexpr = SUPER_BYTES + 256 // GROUP * 32 * (SCALE_BYTES + OFFSET_BYTES) + 1024 * BITS
    SPAN: tl.constexpr = GROUP if GROUP < 64 else 64  # columns of this tile that share a scale
    inside = rows < count
    row = rows % 32
    base = weight + rows // 32 * block_bytes + k // 256 * FULL
    groups = tl.minimum(256, padded - k // 256 * 256) // GROUP
    group = (k % 256 + SPAN * tl.arange(0, 64 // SPAN)) // GROUP
    place = 32 * group[None, :] + row[:, None]
    scales = base[:, None] + SUPER_BYTES
    mask = inside[:, None]
    scale = _number(scales, place, mask, SCALE)
    words = (base + SUPER_BYTES + groups * 32 * (SCALE_BYTES + OFFSET_BYTES) + 4 * row).to(tl.pointer_type(tl.int32))
    q = codes(words, k % 256, inside, BITS)
    BIAS: tl.constexpr = 1 << (BITS - 1) if OFFSET == "none" else 0
    level = tl.load(table + q) if LEVELS else q.to(tl.float32) - BIAS
    offset = tl.zeros_like(scale)
    if OFFSET == "zero":
        zeros = scales + groups * 32 * SCALE_BYTES
        offset = tl.load(zeros + place, mask=mask, other=0).to(tl.float32)
    elif SCALE == "super4":
        offset = (tl.load(scales + place, mask=mask, other=0) >> 4).to(tl.float32)
    elif OFFSET == "value":
        offset = _number(scales + groups * 32 * SCALE_BYTES, place, mask, "byte" if SUPER else SCALE)
    if SUPER:
        scale *= _number(base[:, None], row[:, None], mask, "float16")
        if OFFSET == "value":
            offset *= _number(base[:, None] + 64, row[:, None], mask, "float16")
    if OFFSET == "zero":
        offset *= scale
    level = tl.reshape(level, [rows.shape[0], 64 // SPAN, SPAN])
    values = level * scale[:, :, None] - offset[:, :, None]
    return tl.reshape(values, [rows.shape[0], 64]), tl.full(rows.shape, 1.0, tl.float32)


@triton.jit
def _number(section, place, mask, KIND: tl.constexpr):
    """Return the numbers ``place`` of a section of scales, as float32."""
    if KIND == "float32":
        x = tl.load((section + 4 * place).to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)
    elif KIND == "float16":
        x = tl.load((section + 2 * place).to(tl.pointer_type(tl.float16)), mask=mask, other=0.0)
    elif KIND == "bfloat16":
        x = tl.load((section + 2 * place).to(tl.pointer_type(tl.bfloat16)), mask=mask, other=0.0)
    elif KIND == "super":
        x = tl.load((section + place).to(tl.pointer_type(tl.int8)), mask=mask, other=0)
    elif KIND == "super4":
        x = tl.load(section + place, mask=mask, other=0) & 15
    else:
        x = tl.load(section + place, mask=mask, other=0)
    return x.to(tl.float32)
