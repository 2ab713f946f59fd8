"""Folders in memory, for job stores: flushing a file to a disk takes milliseconds, and these tests flush thousands."""

from __future__ import annotations

import shutil
from pathlib import Path

ENOUGH_BYTES = 2 << 30
"""Free memory that the tests need at most; containers may have less."""


def memory_parent() -> Path | None:
    """Return a file system in memory that has room for job stores; None means the usual temporary folder."""
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir() and shutil.disk_usage(shared_memory).free > ENOUGH_BYTES:
        return shared_memory
    return None
