"""Sizes of memory, and advice to the kernel about memory-mapped files.

The advice is specific to Linux. On other systems it is skipped, which costs speed only. This module does not
depend on the content of files.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
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

PREFETCH_BYTES = 128 << 10
"""Bytes in one prefetch call. Of a larger range, Linux reads no more than the read-ahead of the disk."""

PREFETCH_REQUESTS = 256
"""Calls of ``Prefetcher.prefetch`` that still read ahead after this process last read from disk."""

POPULATE_BYTES = 64 << 20
"""Bytes of a mapped file loaded in one call. During the call, no other thread of this process can map memory."""

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


def device_available(device: torch.device) -> int:
    """Return the free bytes of the memory in which tensors of ``device`` are allocated."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available()


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
    """Return the values in the lines "name: number kB" of a file in /proc, in bytes by name; empty if unreadable."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    parts = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(number) * 1024 for name, number, _ in parts}


def disk_bytes(process: Path) -> int:
    """Return the bytes that a process, given as its folder in /proc, has read from disks so far; 0 if unknown."""
    try:
        lines = (process / "io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)


def map_file(path: Path) -> Tensor:
    """Return the bytes of a file, mapped copy-on-write: writes stay in this process and never reach the file.

    Raises:
        OSError: the file cannot be mapped.
    """
    # Without MAP_NORESERVE, Linux refuses a writable mapping that is larger than its memory.
    flags = mmap.MAP_PRIVATE | (getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0)
    with path.open("rb") as file:
        return torch.frombuffer(
            mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8
        )


def load_in_background(mapped: Tensor) -> threading.Thread:
    """Start to read a mapped file into memory, in pages of 2 MiB where Linux can, and return the reading thread.

    With pages of 4 KiB, a kernel that streams through the weights spends up to a quarter of its time on page table
    lookups. Linux uses large pages only for data read from disk after this advice; ``evict`` makes it read again.
    """
    _call("madvise", mapped.data_ptr(), mapped.nbytes, _HUGE_PAGE)

    def populate() -> None:
        for begin in range(0, mapped.nbytes, POPULATE_BYTES):
            size = min(POPULATE_BYTES, mapped.nbytes - begin)
            if not _call("madvise", mapped.data_ptr() + begin, size, _POPULATE_READ):
                return  # Linux before 5.14 loads pages only when they are accessed

    thread = threading.Thread(target=populate, name="moesaic-load", daemon=True)
    thread.start()
    return thread


def release_unused() -> None:
    """Return memory that this process no longer uses to the system: that of reference cycles, and of free blocks.

    A closed model is a part of cycles. The C library keeps freed blocks for later, and only glibc can release them.
    PyTorch keeps freed blocks of GPUs.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def evict(path: Path) -> None:
    """Write a file to disk and drop it from the page cache, so that a later read can use pages of 2 MiB."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def map_large_allocations(nbytes: int) -> None:
    """Let the C library take each allocation of at least ``nbytes`` from the system, and give it back when it is freed.

    Otherwise glibc raises this size to 32 MB as such allocations are freed, and keeps their memory in pieces that later
    ones may not fit in. Without glibc, nothing changes.
    """
    threshold = -3  # M_MMAP_THRESHOLD
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(threshold, nbytes)


def lock(parts: Iterable[Tensor], max_bytes: int) -> int:
    """Lock the memory of tensors, up to ``max_bytes`` in all and as far as the system permits.

    A page is locked when it is first read, so this call reads nothing.

    Returns:
        The number of bytes locked.
    """
    on_fault, locked = 1, 0  # MLOCK_ONFAULT locks a page when it is first accessed
    for part in parts:
        if locked + part.nbytes <= max_bytes and _call("mlock2", part.data_ptr(), part.nbytes, on_fault):
            locked += part.nbytes
    return locked


class Prefetcher:
    """Reads parts of mapped files from disk before they are accessed, with all reads in flight at once.

    If all data is in memory already, prefetching costs about a tenth of the time of a token. It is therefore active
    only while this process reads from disk, which takes half a microsecond to check.
    """

    def __init__(self) -> None:
        self._requests_left = PREFETCH_REQUESTS
        self._disk_reads = _disk_reads()

    def prefetch(self, parts: Callable[[], Iterable[Tensor]]) -> None:
        """Start to read the tensors that ``parts`` returns; ``parts`` is called only while prefetching is active."""
        disk_reads = _disk_reads()
        if disk_reads != self._disk_reads:
            self._disk_reads, self._requests_left = disk_reads, PREFETCH_REQUESTS
        if not self._requests_left:
            return
        self._requests_left -= 1
        page = mmap.PAGESIZE
        for part in parts():
            first, end = part.data_ptr() // page * page, part.data_ptr() + part.nbytes
            for begin in range(first, end, PREFETCH_BYTES):
                _call("madvise", begin, min(PREFETCH_BYTES, end - begin), _WILL_NEED)


_WILL_NEED = 3  # MADV_WILLNEED, which every system with madvise has
_HUGE_PAGE, _POPULATE_READ = 14, 22  # MADV_HUGEPAGE and MADV_POPULATE_READ; other systems reject them without effect


def _disk_reads() -> tuple[int, int]:
    """Return the numbers of major page faults and of blocks read from disk by this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt, usage.ru_inblock


@functools.cache
def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _call(name: str, address: int, size: int, advice: int) -> bool:
    """Call a function of the C library, such as madvise, on a range of memory; return whether it succeeded.

    Return False if this system lacks the function.
    """
    function = _function(name)
    return function is not None and function(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0
