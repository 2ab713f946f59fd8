"""Asks Linux what of a mapping is in memory."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor


def resident(part: Tensor) -> int:
    """Return how many bytes of a page-aligned part of a mapping are in memory."""
    pages = (ctypes.c_ubyte * -(-part.nbytes // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(part.nbytes), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE
