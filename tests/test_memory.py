"""Memory sizes and mapped files, on real files and with the counters of the kernel."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import re
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic import memory
from tests.support.memory import resident

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

PAGE_OUT = 21  # MADV_PAGEOUT
SIZE = 48 << 20


def evict(path: Path, mapped: Tensor) -> None:
    """Drop a file from the page cache; skip the test where that fails, as on a file system in memory."""
    ctypes.CDLL(None).madvise(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.nbytes), PAGE_OUT)
    memory.evict(path)
    if resident(mapped):
        pytest.skip("this system cannot drop the file from the page cache")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "weights"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    path, size = tmp_path / "sparse", 2 * memory.total()
    with path.open("wb") as file:
        file.truncate(size)
    mapped = memory.map_file(path)
    assert mapped.nbytes == size and mapped[-1] == 0
    mapped[-1] = 1  # changes only this process's copy of the page
    with path.open("rb") as file:
        file.seek(size - 1)
        assert file.read() == b"\0"


def test_file_is_loaded_in_background(file: Path) -> None:
    mapped = memory.map_file(file)
    evict(file, mapped)
    memory.load_in_background(mapped).join()
    assert resident(mapped) == SIZE


def large(mapped: Tensor) -> int:
    """Return how many bytes of a mapping lie in pages of 2 MiB."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    mapping = next(block for block in blocks if block.startswith(f"{mapped.data_ptr():x}-"))
    return 1024 * int(re.search(r"^FilePmdMapped: +(\d+) kB", mapping, re.M)[1])


def test_loaded_file_lies_in_large_pages(file: Path) -> None:
    libc, probe = ctypes.CDLL(None), memory.map_file(file)
    evict(file, probe)
    libc.madvise(ctypes.c_void_p(probe.data_ptr()), ctypes.c_size_t(SIZE), 14)  # MADV_HUGEPAGE
    probe[::4096].sum()
    if not large(probe):
        pytest.skip("this system has no large pages for files")
    del probe
    mapped = memory.map_file(file)
    evict(file, mapped)
    memory.load_in_background(mapped).join()
    assert large(mapped) == SIZE


def test_prefetched_range_is_read_completely(file: Path) -> None:
    mapped = memory.map_file(file)
    evict(file, mapped)
    begin, end = 4 << 20, 44 << 20  # more than any read-ahead
    memory.Prefetcher().prefetch(lambda: [mapped[begin + 100 : end - 100]])
    deadline = time.monotonic() + 30
    while resident(mapped[begin:end]) < end - begin and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(mapped[begin:end]) == end - begin
    assert resident(mapped) < SIZE


def test_prefetching_stops_without_disk_reads(file: Path) -> None:
    mapped, prefetcher, calls = memory.map_file(file), memory.Prefetcher(), list[int]()

    def parts() -> list[Tensor]:
        calls.append(1)
        return []

    for _ in range(100 * memory.PREFETCH_REQUESTS):  # other threads of this process may read from disk
        before = len(calls)
        prefetcher.prefetch(parts)
        if len(calls) == before:
            break
    assert len(calls) == before >= memory.PREFETCH_REQUESTS
    evict(file, mapped)
    assert int(mapped[SIZE // 2]) >= 0  # this access reads from disk
    prefetcher.prefetch(parts)
    assert len(calls) > before


def test_lock_stays_within_its_limit() -> None:
    parts = [torch.zeros(mmap.PAGESIZE, dtype=torch.uint8) for _ in range(4)]
    assert memory.lock(parts, 0) == 0
    assert memory.lock(parts, 3 * mmap.PAGESIZE - 1) in (
        0,
        2 * mmap.PAGESIZE,
    )  # 0 where the system does not permit locking


def test_memory_of_cycles_is_released() -> None:
    class Node:
        pass

    node = Node()
    node.itself = node  # type: ignore[attr-defined]
    alive = weakref.ref(node)
    gc.disable()
    try:
        del node
        assert alive() is not None
        memory.release_unused()
        assert alive() is None
    finally:
        gc.enable()


def test_container_limit_bounds_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.total()
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / "none", tmp_path / "max"))
    (tmp_path / "max").write_text("max\n")
    assert memory.total() >= whole
    (tmp_path / "max").write_text("12345678\n")
    assert memory.total() == 12345678 >= memory.available()


@pytest.mark.parametrize(
    ("limit", "usage", "stat"),
    [
        ("memory.max", "memory.current", "anon 700\nactive_file 40\ninactive_file 60\nunevictable 0\n"),
        (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "active_file 1\ninactive_file 1\ntotal_active_file 40\ntotal_inactive_file 60\n",
        ),
    ],
)
def test_container_page_cache_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, usage: str, stat: str
) -> None:
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / limit,))
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / usage).write_text("800\n")
    assert memory.available() == 200
    (tmp_path / "memory.stat").write_text(stat)
    assert memory.available() == 300
    (tmp_path / usage).write_text("2000\n")
    assert memory.available() == 0


def test_gpu_memory_comes_from_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index, 24))
    assert memory.device_available(torch.device("cuda:3")) == 3
    monkeypatch.setattr(memory, "available", lambda: 5)
    assert memory.device_available(torch.device("cpu")) == 5
