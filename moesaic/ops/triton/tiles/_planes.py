"""Reads codes from planes of 32-bit words, as ``formats/_planes.py`` describes them.

A warp reads the 32 words of one chunk of columns, one for each row of a block: 128 consecutive bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane(words, k, inside, first, stride, BITS: tl.constexpr, RUN: tl.constexpr):
    """Return the fields [n, 64] of columns k .. k + 63 of a superblock as int32.

    ``words`` [n] points to the rows' words of the first chunk of all planes; ``first`` is the word of this plane in a
    run and ``stride`` the words of a run with all its planes.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    chunk = tl.arange(0, 64 // PER_WORD)
    column = k + chunk * PER_WORD
    places = (column // RUN) * stride + first + (column % RUN) // PER_WORD * 32
    packed = tl.load(words[:, None] + places[None, :], mask=inside[:, None], other=0)
    column = tl.arange(0, PER_WORD)  # column 4 j + b of a word is field j of byte b
    shift = 8 * (column % 4) + BITS * (column // 4)
    fields = (packed[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(fields, [words.shape[0], 64])


@triton.jit
def codes(words, k, inside, BITS: tl.constexpr):
    """Return the codes [n, 64] of columns k .. k + 63 of a superblock as int32; arguments as for ``plane``."""
    if BITS == 3:
        low = plane(words, k, inside, 0, 96, 2, 32)
        q = low | (plane(words, k, inside, 64, 96, 1, 32) << 2)
    elif BITS == 5:
        low = plane(words, k, inside, 0, 160, 4, 32)
        q = low | (plane(words, k, inside, 128, 160, 1, 32) << 4)
    elif BITS == 6:
        low = plane(words, k, inside, 0, 192, 4, 32)
        q = low | (plane(words, k, inside, 128, 192, 2, 32) << 4)
    else:
        q = plane(words, k, inside, 0, 64 * BITS, BITS, 64)
    return q
