"""Rotates activations for the integer formats, as ``formats/_rotation.py`` describes.

The result is divided by 16, and readers multiply the steps of weights by 16, so that rotated activations keep about
the magnitude that they had: float16 would overflow otherwise.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.formats import _rotation
from moesaic.formats._blocks import SUPER


def rotated(x: Tensor) -> Tensor:
    """Return x [T, n] rotated and divided by 16: [T, columns padded to 64], in x's dtype."""
    tokens, columns = x.shape
    padded = -(-columns // 64) * 64
    out = torch.empty((tokens, padded), dtype=x.dtype, device=x.device)
    begin = 0
    for size in (256, 128, 64):
        parts = (padded - begin) // size
        if parts and tokens:
            _rotate[(tokens, parts)](x, _signs(x.device), out, begin, columns, padded, ROWS=size // 16)
        begin += parts * size
    return out


@functools.cache
def _signs(device: torch.device) -> Tensor:
    return _rotation._signs(SUPER, device)


@triton.jit
def _rotate(x, signs, out, begin, columns, padded, ROWS: tl.constexpr):
    """Multiply one part of 16 x ROWS columns with the Hadamard matrix of its size, as a product of two small ones."""
    token = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, 16)
    at = begin + tl.program_id(1) * (16 * ROWS) + row[:, None] * 16 + column[None, :]
    part = tl.load(x + token * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    part *= tl.load(signs + at % 256)
    # Products with 1 and -1 would be compiled to matrix instructions in TF32, which round.
    part = tl.sum(tl.where(_is_negative(column, column)[None, :, :], -part[:, :, None], part[:, :, None]), 1)
    part = tl.sum(tl.where(_is_negative(row, row)[:, :, None], -part[None, :, :], part[None, :, :]), 1)
    tl.store(out + token * padded + at, (part * 0.0625).to(out.dtype.element_ty))


@triton.jit
def _is_negative(row, column):
    """Return which entries of the Hadamard matrix in Sylvester's order are -1, for up to 16 rows and columns."""
    common = row[:, None] & column[None, :]
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    return (common & 1) == 1
