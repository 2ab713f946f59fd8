"""What memory there is, and mapped files: what the system is told about how they will be read.

Knows addresses, pages and Linux's advice; elsewhere the advice is left out and everything still works.
Does not know what is in a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

AHEAD = 128 << 10
"""Bytes asked for in one call: of more, Linux reads only as much as the device's read-ahead and drops the rest."""

PATIENCE = 256
"""Requests to go on making after the last byte was read from disk."""

FETCHED = 64 << 20
"""Bytes of a mapped file that are fetched in one call; others of this process wait that long to map anything."""

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with the memory limit of this process's control group, in versions 2 and 1 of control groups."""

CGROUP_USAGES = ("memory.current", "memory.usage_in_bytes")
"""Files beside the limit with the bytes that the control group uses, page cache included."""

RECLAIMABLE = ("active_file", "inactive_file")
"""Entries of ``memory.stat`` that count page cache, which the kernel frees when the group needs memory."""


def total() -> int:
    """Return the bytes of main memory that this machine has, or the limit of its container if that is lower."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_limits().values()])


def available() -> int:
    """Return the bytes of main memory that can be allocated without taking memory from other processes.

    In a container this is at most the container's limit, less the memory that it already uses.
    """
    free = kilobytes(Path("/proc/meminfo")).get("MemAvailable")
    bounds = [free or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), total()]
    bounds += [limit - _cgroup_usage(file.parent) for file, limit in _cgroup_limits().items()]
    return max(0, min(bounds))


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the available and the total bytes of the memory in which tensors of ``device`` are allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return available(), total()


def _cgroup_limits() -> dict[Path, int]:
    """Return the memory limits of this process's control group, by the file that holds each."""
    limits = {}
    for file in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # version 2 writes "max" where there is no limit
            limits[file] = int(file.read_text())
    return limits


def _cgroup_usage(folder: Path) -> int:
    """Return the bytes that a control group uses and the kernel cannot reclaim; 0 if they are unknown."""
    usage = 0
    for name in CGROUP_USAGES:
        with contextlib.suppress(OSError, ValueError):
            usage = int((folder / name).read_text())
    with contextlib.suppress(OSError, ValueError):
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Version 1 counts child groups only in the entries that begin with "total_".
        usage -= sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in RECLAIMABLE)
    return max(0, usage)


def kilobytes(path: Path) -> Mapping[str, int]:
    """Return the lines "name: number kB" of a file of the system, in bytes; nothing where there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    parts = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in parts}


def map_file(path: Path) -> Tensor:
    """Return the bytes of a file, mapped: what is written to them is kept apart, and never reaches the file.

    Raises:
        OSError: it cannot be mapped.
    """
    # Without MAP_NORESERVE, Linux refuses a mapping that may be written to and is larger than its memory.
    flags = mmap.MAP_PRIVATE | (getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0)
    with path.open("rb") as file:
        return torch.frombuffer(
            mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8
        )


def fetch(mapped: Tensor) -> threading.Thread:
    """Have all of a mapped file in memory soon, in pages of 2 MiB where Linux can; returns at once.

    A kernel that streams through pages of 4 KiB spends up to a quarter of its time looking them up. Linux gives
    larger ones to what is read from disk under this advice, and to nothing that is in memory already: see ``forget``.
    """
    _call("madvise", mapped.data_ptr(), mapped.nbytes, _HUGE_PAGE)

    def populate() -> None:
        for begin in range(0, mapped.nbytes, FETCHED):
            if not _call("madvise", mapped.data_ptr() + begin, min(FETCHED, mapped.nbytes - begin), _POPULATE_READ):
                return  # before Linux 5.14: pages come as they are touched

    thread = threading.Thread(target=populate, name="moesaic-fetch", daemon=True)
    thread.start()
    return thread


def forget(path: Path) -> None:
    """Write a file out and have the system drop it from memory, where it may lie in pages of 4 KiB."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def lock(parts: Iterable[Tensor], most: int) -> int:
    """Have the system keep these in memory once they were read, as far as it lets us and up to ``most`` bytes.

    Returns:
        How many bytes that is.
    """
    on_fault, locked = 1, 0  # MLOCK_ONFAULT: when they are first read, not now
    for part in parts:
        if locked + part.nbytes <= most and _call("mlock2", part.data_ptr(), part.nbytes, on_fault):
            locked += part.nbytes
    return locked


class Early:
    """Has parts of mapped files read from disk before they are needed, all of them at once.

    Where everything is in memory already, asking costs about a tenth of the time of a token; so it is done only
    as long as this process does read from disk, which takes half a microsecond to find out.
    """

    def __init__(self) -> None:
        self._left = PATIENCE
        self._read = _reads()

    def ask(self, parts: Callable[[], Iterable[Tensor]]) -> None:
        """Ask for ``parts``, which is called only if there is something to ask for."""
        read = _reads()
        if read != self._read:
            self._read, self._left = read, PATIENCE
        if not self._left:
            return
        self._left -= 1
        page = mmap.PAGESIZE
        for part in parts():
            first, end = part.data_ptr() // page * page, part.data_ptr() + part.nbytes
            for begin in range(first, end, AHEAD):
                _call("madvise", begin, min(AHEAD, end - begin), _WILL_NEED)


_WILL_NEED = 3  # MADV_WILLNEED, on every system that has madvise
_HUGE_PAGE, _POPULATE_READ = 14, 22  # Linux only, elsewhere errors that change nothing


def _reads() -> tuple[int, int]:
    """Return two counters that rise when this process has to wait for a disk, or reads from one."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt, usage.ru_inblock


@functools.cache
def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _call(name: str, address: int, size: int, advice: int) -> bool:
    """Return whether the system did what was asked of it."""
    function = _function(name)
    return function is not None and function(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0
