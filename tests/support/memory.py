"""Resident pages of memory mappings, as Linux reports them."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor


def resident(part: Tensor) -> int:
    """Return how many bytes of ``part`` are in memory. It must begin at a page of a mapping."""
    pages = (ctypes.c_ubyte * -(-part.nbytes // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(part.nbytes), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE
